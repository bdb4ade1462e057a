# Stands for the nixpkgs-cuda input, which is only imported.
{
  outputs = _: { };
}
