"""Int8 forms of float weights: the store, the formats of files, and how a user reports changed weights.

``store``         the int8 form of each float weight, made once and never stale
``invalidation``  weights that changed unseen, and freed ones that are wanted back
``formats``       how an int8 weight and its scale are named in a checkpoint
"""
