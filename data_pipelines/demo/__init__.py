"""Demo data with true labels and held-out splits: generated offline from what the declared dependencies carry."""
