"""Folders of transformers checkpoints: ``convert`` writes an int8 copy, ``comparison`` runs both side by side on what
``example_inputs`` makes."""
