# What it takes to open a listener to others, said once for every service.
{ lib }:
rec {
  # Whether an address is reached from this host alone.
  isLoopback =
    host:
    lib.elem host [
      "::1"
      "[::1]"
      "localhost"
    ]
    || lib.hasPrefix "127." host;

  # Where this host itself reaches a listener: any address means every address.
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

  # { option, what, host, hostOption, opened } -> the assertion that what is opened is also reachable.
  openedIsReachable =
    {
      # The option that opens the port, and whether it is set.
      option,
      opened,
      # What listens, where, and the option that says so.
      what,
      host,
      hostOption,
    }:
    {
      assertion = opened -> !isLoopback host;
      message = "${option}: ${what} listens on ${host} only, must listen on an outer address; set ${hostOption} = \"0.0.0.0\"";
    };
}
