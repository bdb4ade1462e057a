# The unfree packages that are allowed, and no others: a Pascal host's driver and llama.cpp's CUDA by name, CUDA 11.8 by licence.
{ lib }:
{
  # Names, not a predicate: NixOS merges lists of several modules, but accepts only one predicate.
  host = {
    nvidia.acceptLicense = true;
    allowUnfreePackages = [
      # Of llama.cpp, built with CUDA 12.9. `cccl` is the newer name of `cuda_cccl`.
      "cccl"
      "cuda_cccl"
      "cuda_cudart"
      "cuda_nvcc"
      "libcublas"
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
