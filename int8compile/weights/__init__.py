"""Int8 forms of float weights: making and keeping them, their formats in files, and reports of changed weights.

``int8_weight``    the int8 form of a float weight, and the way back
``store``          the int8 form of each float weight, made once and anew when the weight has changed
``stamps``         what a float weight looked like, which tells whether it has changed
``lifted_inputs``  what fills a compiled graph's int8 inputs at each call
``invalidation``   after an optimiser's step (a hook) or on request, forgets int8 forms; brings freed weights back
``formats``        how an int8 weight and its scale are named in a checkpoint
"""
