"""Exported programs: ``export``, ``save`` and ``load``, ``package`` and ``load_package``.

``exporting``      exports a model with the passes run on its program
``archive``        the program's file; ``records``, ``model_json``, ``json_values``, ``tensor_records`` and
                   ``saved_inputs`` check all of it
``packaging``      compiles a program by AOTInductor, for the CPUs in ``cpu_targets``
"""
