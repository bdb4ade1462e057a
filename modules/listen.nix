# The conditions under which a listener may be opened to other hosts, for every service.
{ lib }:
rec {
  # Whether only this host can reach an address.
  isLoopback =
    host:
    lib.elem host [
      "::1"
      "[::1]"
      "localhost"
    ]
    || lib.hasPrefix "127." host;

  # The address at which this host itself reaches a listener: 0.0.0.0 and :: mean every address.
  reachedAt =
    host:
    if
      lib.elem host [
        ""
        "0.0.0.0"
        "::"
        "[::]"
      ]
    then
      "127.0.0.1"
    else
      host;

  # { option, what, host, hostOption, opened } -> the assertion that an opened port is also reachable.
  openedIsReachable =
    {
      # The option that opens the port, and whether it is set.
      option,
      opened,
      # What listens, at which address, and the option that sets it.
      what,
      host,
      hostOption,
    }:
    {
      assertion = opened -> !isLoopback host;
      message = "${option}: ${what} listens on ${host} only, must listen on an outer address; set ${hostOption} = \"0.0.0.0\"";
    };
}
