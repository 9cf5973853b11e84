"""Side-by-side runs of dspref and its peers; see README.md."""
