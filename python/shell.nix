# Development: uv for the workspace, promtool for the rules, formatters and linters for Nix, and CUDA 11.8 for the kernels where the
# package set has it (x86_64-linux).
{ pkgs }:
let
  cuda = pkgs.cudaPackages_pascal or { };
in
pkgs.mkShell {
  packages = [
    pkgs.deadnix
    pkgs.nixfmt-tree
    pkgs.prometheus.cli
    pkgs.python312
    pkgs.statix
    pkgs.uv
  ]
  ++ pkgs.lib.attrValues (
    builtins.intersectAttrs (pkgs.lib.genAttrs [
      "cuda_cuobjdump"
      "cuda_nvcc"
      "cuda_nvdisasm"
      "cuda_nvrtc"
    ] (_: null)) cuda
  );
  # uv's own interpreters and the wheels' libraries do not find Nix' loader; use the interpreter above.
  UV_PYTHON_DOWNLOADS = "never";
  UV_PYTHON = pkgs.lib.getExe pkgs.python312;
  LD_LIBRARY_PATH = pkgs.lib.makeLibraryPath [
    pkgs.stdenv.cc.cc.lib
    pkgs.zlib
  ];
}
