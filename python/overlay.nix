# The flake's packages, as an overlay: the Python environments, CUDA 11.8 from its own nixpkgs, llama.cpp for Pascal.
{ nixpkgs-cuda }:
final: _prev:
let
  inherit (final) lib;
  inherit (final.stdenv.hostPlatform) system;
  unfree = (import ./unfree.nix { inherit lib; }).cuda;
  capabilities = [
    "6.0"
    "6.1"
  ];
  environments = final.callPackage ./default.nix { };
  locked = environments { };
in
{
  cudaPackages_pascal =
    (import nixpkgs-cuda {
      inherit system;
      config = unfree // {
        cudaSupport = true;
        cudaCapabilities = capabilities;
      };
    }).cudaPackages_11_8;

  inherit (locked)
    pascaline
    pascaline-router
    pascaline-app
    pascaline-builtin
    sglang-pascal-kernels
    ;

  pascaline-engine = lib.makeOverridable (
    { torchFlavour }: (environments { inherit torchFlavour; }).pascaline-engine
  ) { torchFlavour = "pypi"; };

  # CUDA 12.9 is the newest that still generates code for Pascal, but only if it is asked to. Not by another instance of nixpkgs with these
  # settings: the last -D wins.
  llama-cpp-pascal =
    (final.llama-cpp.override {
      cudaSupport = true;
      cudaPackages = final.cudaPackages_12_9;
    }).overrideAttrs
      (old: {
        cmakeFlags = old.cmakeFlags ++ [
          "-DCMAKE_CUDA_ARCHITECTURES=${
            lib.concatMapStringsSep ";" (lib.replaceStrings [ "." ] [ "" ]) capabilities
          }"
        ];
      });
}
