"""Estimates of a run's memory, time and price, for pretraining and its evaluation, before anything is paid for."""
