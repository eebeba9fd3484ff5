#!/bin/sh
# The quickstart in containers, in the foreground; ends with the run's own exit code. Words are passed to `docker compose`,
# for example: sh compose/up.sh -f docker-compose.yml -f compose/gpu.yml
set -eu
engine=$(docker version --format '{{.Server.Version}}' 2>/dev/null) || engine=""
compose=$(docker compose version --short 2>/dev/null) || compose=""
if [ -z "$engine" ] || [ "${engine%%.*}" -lt 25 ] || [ -z "$compose" ]; then
    echo "No Docker engine that will do answers here: found engine ${engine:-none} and compose ${compose:-none}, needed are 25 and 2.20.2." >&2
    echo "Install and start one (docs.docker.com/engine/install), or run without containers: make quickstart" >&2
    exit 2
fi
docker compose "$@" up
exit "$(docker compose "$@" ps -a --format '{{.ExitCode}}' supervisor)"
