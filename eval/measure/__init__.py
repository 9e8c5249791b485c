"""Measures an encoder. To follow an image to result.json, read features, logistic, protocols, linear_eval, evaluation."""
