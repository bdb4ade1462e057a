# The host's hardware, and what it serves.
{
  networking.hostName = "box";
  services.openssh.enable = true;
  users.users.root.openssh.authorizedKeys.keys = [
    # "ssh-ed25519 AAAA… you@example.org"
  ];

  # R580 with its closed kernel module, the last driver for Pascal. "6.0" for a Tesla P100.
  hardware.pascaline.driver = {
    enable = true;
    computeCapability = "6.1";
  };

  services.pascaline = {
    models.emily = {
      # A file on the host; or url = "https://…", which is downloaded and resumed.
      path = "/srv/models/emily.Q4_K_M.gguf";
      # sha256sum /srv/models/emily.Q4_K_M.gguf
      sha256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    };
    instances.emily = {
      model = "emily";
      settings.card = "tesla-p4";
      settings.context_length = 4096;

      # For other machines, once the key is there (docs/first-switch.md, Secrets):
      # apiKeyFile = "/etc/pascaline/api-key";
      # settings.host = "0.0.0.0";
      # openFirewall = true;
    };
    exporter.enable = true;
  };

  # The release whose defaults this host keeps after upgrades.
  system.stateVersion = "26.05";
}
