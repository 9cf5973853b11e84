"""The data path, from files to packed batches, in six steps.

1. `sources`: files, folders, globs and hub sets become lists of files and tables (`parts`); `splits` says which of them a
   split means, and refuses what finds nothing. `rowfiles` reads the raw rows of files. Every row knows its file and line, so
   that any later complaint can name the place. A broken line is a `BadRow`, a broken file is an error. `overlap` finds
   sources that read the same rows.
2. `normalise`: the fields of a raw row under their own names, whatever layout of whatever tool it has (with `messages`, one
   message in its own form, `row_template`, fields made from columns, and `rows`, types and errors); `converting`: a source
   speaks one way; `beside`: columns and keys of messages that are not read are told.
   `formats`: they become a `Preference`: a prompt, a chosen and a rejected answer, all text or all message lists. The table
   `FORMATS` names what is understood. A prompt that answers repeat is taken out (`texts`); else no text is changed.
   `completions`: a row of several scored answers becomes several pairs.
3. `template`: the chat template renders the prompt and both full texts. `manners`: how it writes a turn is learned from a
   probe; `turns`: where each of the assistant's lies; `printed`: whether a rendering holds what the messages say; `marks`:
   which of the template's marks these say themselves.
   `tokenize`: each text becomes tokens as a whole (`pieces` says how, without doing it twice), the answers start where the
   token sequences part, and a mask says what is scored. `truncate` treats both sides alike; `show` prints a pair with its
   marks.
   `store` keeps the result on disk, memory-mapped and addressed by content: a second run, another rank or another
   objective finds the same tokens without reading a row. `building` makes it (`complaints` counts what it
   leaves out), `cache` puts it in place and knows when it is damaged.
4. `plan`: `order` says which pairs form each optimizer step, from row counts and a seed alone; `group` puts
   pairs of one prompt together, and `pack` says which groups share a pack, per rank and micro-step.
5. `batch`: the pairs of one pack become a `PackedBatch`: one row of tokens, the attention segments, and the
   index of every scored token.
6. `loader`: an iterator over optimizer steps that ties 4 and 5 together and can start at any step. `ahead`
   makes the next step while one is in use.

Nothing here sees a rank, a device or a config object.

Enters: nothing.
Shows: ahead, batch, loader, overlap, plan, rows, show, sources, store, tokenize, truncate.
"""

from typing import TYPE_CHECKING

from dspref.lazily import lazily

if TYPE_CHECKING:
    from dspref.data.batch import PackedBatch, collate
    from dspref.data.tokenize import load_tokenizer, tokenize_pairs
    from dspref.data.truncate import Limits, TokenizedPair

__all__ = ["Limits", "PackedBatch", "TokenizedPair", "collate", "load_tokenizer", "tokenize_pairs"]
__getattr__ = lazily(
    __name__,
    **dict.fromkeys(("PackedBatch", "collate"), "dspref.data.batch"),
    **dict.fromkeys(("load_tokenizer", "tokenize_pairs"), "dspref.data.tokenize"),
    **dict.fromkeys(("Limits", "TokenizedPair"), "dspref.data.truncate"),
)
