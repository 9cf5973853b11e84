"""From files to packed batches, in six steps. Ranks, devices and settings come in as plain values; none is asked for.

1. `sources` lists files and tables, by `splits` and `parts`; `rowfiles` reads them, `overlap` finds what two of them share.
2. `normalise` names the fields of a row (`messages`, `row_template`, `row_settings`, `rows`, `given`; `own_format`;
   `converting`: a source speaks one way), `formats` makes pairs (`texts`, `completions`, `labelled`, `gold`; not: `beside`).
3. `template` renders a pair (`manners`, `turns`, `printed`, `marks`: what it writes, and where), `tokenize` makes tokens
   of it (`apart`: for encoder-decoder models) and a mask of what is scored (`pieces`, `truncate`, `one_prompt`;
   `vocabulary`), and `store` keeps them on disk, addressed by content, for all runs (`building`, `complaints`, `cache`,
   `sameness`, `given_store`). Of images: `image_rows` says where, `image_files` and `image_store` which, `sight` how.
4. `plan` says which pairs form a step (`mismatched`: with others' answers; `whole_rows`), and which share packs and ranks.
5. `batch` makes a `PackedBatch`: tokens, attention segments, what is scored, `images`; `slices`: a rank's part of a pack.
6. `loader` gives the steps, from any on, and `ahead` makes the next one while one is in use.

`prompts` reads prompts without answers. To be looked at: pairs (`choosing`: which; `origin`: their rows; `show`, `spans`),
packs (`layout`), and `figures` of all.

Enters: nothing.
Shows: ahead, apart, batch, choosing, figures, image_files, image_rows, image_store, images, layout, loader, manners,
messages, mismatched, origin, overlap, own_format, plan, prompts, rows, show, sight, slices, sources, spans, store, tokenize,
truncate, vocabulary.
"""

from typing import TYPE_CHECKING

from dspref.lazily import lazily

if TYPE_CHECKING:
    from dspref.data.batch import PackedBatch, collate
    from dspref.data.formats import Preference
    from dspref.data.tokenize import load_tokenizer, tokenize_pairs
    from dspref.data.truncate import Limits, TokenizedPair

__all__ = ["Limits", "PackedBatch", "Preference", "TokenizedPair", "collate", "load_tokenizer", "tokenize_pairs"]
__getattr__ = lazily(
    __name__,
    **dict.fromkeys(("PackedBatch", "collate"), "dspref.data.batch"),
    Preference="dspref.data.formats",
    **dict.fromkeys(("load_tokenizer", "tokenize_pairs"), "dspref.data.tokenize"),
    **dict.fromkeys(("Limits", "TokenizedPair"), "dspref.data.truncate"),
)
