"""Inference: the batching engine, sampling, chat, and answering files of requests."""
