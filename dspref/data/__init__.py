"""The data path, from files to packed batches, in six steps.

1. `sources`: files, folders, globs and hub sets become lists of files; `splits` says which of them a split means, and
   refuses what finds nothing. `rowfiles` reads their raw rows. Every row knows its file and line, so that any later
   complaint can name the place. A broken line is a `BadRow`, a broken file is an error.
2. `formats`: a raw row becomes a `Preference`: a prompt, a chosen and a rejected answer, all text or all
   message lists. The table `FORMATS` names each layout that is understood. Text is never stripped or changed.
   `completions`: a row of several scored answers becomes several pairs.
3. `tokenize`: a `Preference` becomes a `TokenizedPair`. The chat template renders the prompt and both full
   texts, each is tokenized as a whole, and the answers start where the token sequences part. Truncation
   treats both sides alike, so that they keep the same prompt.
   `store` keeps the result on disk, memory-mapped and addressed by content: a second run, another rank or another objective
   finds the same tokens without reading a row. `building` makes it, `cache` puts it in place and knows when it is damaged.
4. `plan`: `order` says which pairs form each optimizer step, from row counts and a seed alone; `group` puts
   pairs of one prompt together, and `pack` says which groups share a pack, per rank and micro-step.
5. `batch`: the pairs of one pack become a `PackedBatch`: one row of tokens, the attention segments, and the
   index of every scored token.
6. `loader`: an iterator over optimizer steps that ties 4 and 5 together and can start at any step. `ahead`
   makes the next step while one is in use.

Nothing here sees a rank, a device or a config object.
"""
