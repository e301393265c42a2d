"""The pages of results, from the records in `model_cards/`."""
