# The defaults that the Python package has too, from its own file: ports, and settings that modules must know.
builtins.fromJSON (builtins.readFile ../python/pascaline/src/pascaline/defaults.json)
