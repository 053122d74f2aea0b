"""Exported programs: ``export``, ``save`` and ``load``, ``package`` and ``load_package``.

``exporting``      torch.export's program of a model, rewritten
``archive``        its file; ``records``, ``model_json``, ``json_values``, ``tensor_records`` and ``saved_inputs`` read
                   it, trusting no byte
``packaging``      machine code by AOTInductor, for the CPUs in ``cpu_targets``
"""
