# Brings one model file into the store and verifies it: fetch-model SOURCE TARGET SHA256
# SOURCE is a URL (an interrupted download is resumed) or a file. Exit codes: 0 in place and verified, 1 not fetched (try again),
# 2 wrong usage, 3 wrong checksum (the file is deleted: trying again would fetch the same).
set -euo pipefail
if [ $# -ne 3 ]; then
  echo "usage: fetch-model SOURCE TARGET SHA256" >&2
  exit 2
fi
source=$1
target=$2
expected=$3
partial=$target.partial

digest() {
  sha256sum -- "$1" | cut -d ' ' -f 1
}

mkdir -p -- "$(dirname -- "$target")"
# The stamp spares hashing gigabytes at every boot: it names the digest, size and time of the file that was verified.
stamp() {
  printf '%s %s' "$expected" "$(stat -c '%s %Y' -- "$target")"
}
if [ -e "$target" ] && [ "$(cat -- "$target.verified" 2>/dev/null)" = "$(stamp)" ]; then
  echo "$target is in place, verified before"
  exit 0
fi

if [ ! -e "$target" ]; then
  case $source in
  http://* | https://* | file://*)
    # -C - asks for the missing rest; curl refuses an answer that is not 206, and then the whole file is fetched anew.
    if ! curl --fail --location --silent --show-error --retry 3 --continue-at - --output "$partial" -- "$source"; then
      code=$?
      # 33: no ranges; 36: bad resume; 22 with 416: the partial file is as long as the whole one, or longer.
      if [ ! -s "$partial" ] || [ "$(digest "$partial")" != "$expected" ]; then
        echo "resuming was refused (curl exit code $code), fetching $source from the start" >&2
        curl --fail --location --silent --show-error --retry 3 --output "$partial" -- "$source" || exit 1
      fi
    fi
    ;;
  *)
    if [ ! -r "$source" ]; then
      echo "cannot read $source: it must be a file that the pascaline user may read" >&2
      exit 1
    fi
    needed=$(stat -L -c %s -- "$source")
    free=$(df --output=avail -B1 -- "$(dirname -- "$target")" | tail -n 1)
    if [ "$free" -lt "$needed" ]; then
      echo "$(dirname -- "$target") has $free bytes free, the copy of $source needs $needed; make room, or set services.pascaline.stateDir to a larger disk" >&2
      exit 1
    fi
    cp -- "$source" "$partial"
    ;;
  esac
  sync -- "$partial"
  mv -- "$partial" "$target"
fi

found=$(digest "$target")
if [ "$found" != "$expected" ]; then
  rm -f -- "$target" "$target.verified"
  echo "$source has sha256 $found, must be $expected; the file was deleted: correct services.pascaline.models.<name>.sha256, or the source" >&2
  exit 3
fi
stamp >"$target.verified"
echo "$target is in place and verified"
