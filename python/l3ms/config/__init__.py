"""The YAML of a run, as frozen pydantic models: a file per section, `run_config` the whole.

`yaml_reader` reads a file safely, `errors` turns what is wrong into one line that names the field.
"""

from l3ms.earlier import of_a_room

__getattr__ = of_a_room("config")
