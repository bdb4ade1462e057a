# A list of arguments as ExecStart takes it. systemd's quoting is not the shell's: `%` and `$` mean something to it in any quotes.
{ lib }:
let
  quoted =
    argument:
    if builtins.match "[[:alnum:],._+:@%/=-]+" argument != null then
      argument
    else
      builtins.toJSON argument;
  escaped = argument: lib.replaceStrings [ "%" "$" ] [ "%%" "$$" ] (quoted (toString argument));
in
lib.concatMapStringsSep " " escaped
