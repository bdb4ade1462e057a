# CUDA 11.8 by name only: enough to evaluate what uses it.
{ system, ... }:
let
  package =
    name:
    derivation {
      inherit name system;
      builder = "/bin/sh";
    }
    // {
      pname = name;
      meta.mainProgram = name;
      outputs = [ "out" ];
    };
in
builtins.trace "an instance of nixpkgs-cuda" {
  cudaPackages_11_8 = builtins.listToAttrs (
    map
      (name: {
        inherit name;
        value = package name;
      })
      [
        "cuda_cccl"
        "cuda_cudart"
        "cuda_cuobjdump"
        "cuda_cupti"
        "cuda_nvcc"
        "cuda_nvdisasm"
        "cuda_nvprof"
        "cuda_nvrtc"
        "cuda_nvtx"
        "cudnn"
        "libcublas"
        "libcufft"
        "libcurand"
        "libcusolver"
        "libcusparse"
        "nccl"
      ]
  );
}
