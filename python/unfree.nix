# The unfree packages that a Pascal host needs, by name and by licence, and no others.
{ lib }:
{
  nvidia.acceptLicense = true;
  allowUnfreePredicate =
    package:
    lib.elem (lib.getName package) [
      "nvidia-persistenced"
      "nvidia-settings"
      "nvidia-x11"
    ]
    || lib.any (
      licence:
      lib.elem (licence.shortName or "") [
        "CUDA EULA"
        "cuDNN EULA"
      ]
    ) (lib.toList (package.meta.license or [ ]));
}
