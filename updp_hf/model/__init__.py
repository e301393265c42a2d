"""What a merged model is made of. These files are also saved beside its weights, so they import only each other.

They keep the suffix of Hugging Face's modelling files, since that is the name they have in a model's repository.
"""
