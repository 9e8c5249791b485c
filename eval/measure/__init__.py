"""What measures an encoder. Read features, logistic, protocols, linear_eval, evaluation: from an image to result.json."""
