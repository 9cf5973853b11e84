"""How the ranks of a job find each other, before torch.distributed does. No torch, no deepspeed.

`rendezvous` agrees on one address through a folder or the environment of a launcher; `local_store` is the key-value store
of ranks on one machine, on loopback alone; `wire` the form of what they say. `starting` starts those of one machine;
`sockets` is where those of several meet, `log_file` what each writes, `sharing` how many may hold a pack.

Enters: nothing.
Shows: local_store, log_file, rendezvous, sharing, sockets, starting, wire.
"""
