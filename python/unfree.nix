# The unfree packages that are allowed, and no others: a Pascal host's driver by name, CUDA by licence.
{ lib }:
{
  # Names, not a predicate: NixOS adds up lists of several modules, but takes one predicate of many.
  driver = {
    nvidia.acceptLicense = true;
    allowUnfreePackages = [
      "nvidia-kernel-modules"
      "nvidia-persistenced"
      "nvidia-settings"
      "nvidia-x11"
    ];
  };

  cuda.allowUnfreePredicate =
    package:
    lib.any (
      licence:
      lib.elem (licence.shortName or "") [
        "CUDA EULA"
        "cuDNN EULA"
      ]
    ) (lib.toList (package.meta.license or [ ]));
}
