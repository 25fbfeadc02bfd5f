#!/usr/bin/env bash
# The Chromium that tests/test_demo.py drives: finds one or installs it, and prints its path.
#
#   bash tests/install_browser.sh           install where none is found
#   bash tests/install_browser.sh --find    only look
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}

# A browser counts when it tells its version: Ubuntu's chromium-browser is a stub where snap does not run.
find_browser() {
    local path
    for path in chromium chromium-browser google-chrome \
        "$("$python" -c 'from playwright.sync_api import sync_playwright as start
with start() as p: print(p.chromium.executable_path)' 2> /dev/null)"; do
        path=$(command -v "$path") && "$path" --version > /dev/null 2>&1 && echo "$path" && return
    done
    return 1
}

find_browser && exit
if [ "${1:-}" != --find ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
        { apt-get update && apt-get install -y chromium; } >&2 || echo "apt-get could not install chromium" >&2
        find_browser && exit
    fi
    "$python" -m playwright install chromium >&2 || echo "playwright could not install chromium" >&2
    find_browser && exit
fi
echo "error: the demo's test needs a Chromium: apt install chromium (Debian, Ubuntu), or, on any system," \
    "$python -m playwright install chromium" >&2
exit 1
