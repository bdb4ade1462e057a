# What the outputs for macOS name, by name only: the trimmed package set has nothing for it.
{ lib, system }:
let
  package =
    name:
    derivation {
      inherit name system;
      builder = "/bin/sh";
    }
    // {
      pname = name;
      lib = package "${name}-lib";
      meta.mainProgram = name;
    };
in
lib.genAttrs [ "deadnix" "nixfmt-tree" "python312" "statix" "uv" "zlib" ] package
// {
  inherit lib;
  mkShell = attributes: package "shell" // { inherit (attributes) packages; };
  prometheus.cli = package "prometheus-cli";
  stdenv.cc.cc = package "clang";
}
