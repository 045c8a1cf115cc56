"""Downstream classifiers: models, data, training, metrics, influence and the evaluation."""
