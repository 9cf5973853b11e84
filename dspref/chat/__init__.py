"""Talking to a model, or to two at a time: `dspref chat`.

`talk` reads prompts and shows answers, on a terminal or between pipes; `sides` draws two answers beside each other, `choice`
asks which is better and keeps it as a row to train on. A `speaker` is a model with its tokenizer, and what it answers.

Enters: data, model, training, watch.
Shows: talk.
"""
