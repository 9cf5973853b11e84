"""Talking to a model, or to two at a time: `dspref chat`.

`talk` reads prompts and shows answers, on a terminal or between pipes; `sides` draws two answers beside each other, `choice`
asks which is better and keeps it as a row to train on. What an answer is made of is `model.speaking`.

Enters: data, model, training, watch.
Shows: talk.
"""
