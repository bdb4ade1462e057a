# All modules at once. Each is off until its options are set.
{
  imports = [
    ./cloudlab.nix
    ./cuda.nix
    ./driver.nix
    ./exporter.nix
    ./inference.nix
    ./models.nix
    ./monitoring
    ./network.nix
    ./router.nix
  ];
}
