# What all hosts share: who may log in, and the release whose defaults they keep.
{
  users.users.root.openssh.authorizedKeys.keys = [
    # "ssh-ed25519 AAAA… you@example.org"
  ];
  system.stateVersion = "26.05";
}
