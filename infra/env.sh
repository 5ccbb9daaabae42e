# shellcheck shell=sh
# For each terminal that runs Prefect or Ray, from this folder:   . infra/env.sh
# The server listens on this machine alone, asks for a login, which only this user has, and no other site's page may
# read what it answers; `--watch` shows the runs' logs; nothing is told to the makers of Prefect and Ray. What is set
# already stays as it is.
tessera_login="${PREFECT_HOME:-$HOME/.prefect}/tessera-login"
if [ ! -s "$tessera_login" ]; then
    (
        umask 077
        mkdir -p "${tessera_login%/*}"
        printf 'tessera:%s\n' "$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')" > "$tessera_login"
    )
fi
chmod go-rwx "${tessera_login%/*}" "$tessera_login" # beside it lies the server's database

export PREFECT_API_URL="${PREFECT_API_URL:-http://127.0.0.1:4200/api}"
export PREFECT_API_AUTH_STRING="${PREFECT_API_AUTH_STRING:-$(cat "$tessera_login")}"
export PREFECT_SERVER_API_AUTH_STRING="${PREFECT_SERVER_API_AUTH_STRING:-$PREFECT_API_AUTH_STRING}"
export PREFECT_SERVER_CORS_ALLOWED_ORIGINS="${PREFECT_SERVER_CORS_ALLOWED_ORIGINS:-${PREFECT_API_URL%/api}}"
export PREFECT_SERVER_LOGS_STREAM_OUT_ENABLED=true PREFECT_SERVER_LOGS_STREAM_PUBLISHING_ENABLED=true
export PREFECT_SERVER_ANALYTICS_ENABLED=false DO_NOT_TRACK=1 RAY_USAGE_STATS_ENABLED=0
unset tessera_login
