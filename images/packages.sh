#!/bin/sh
# Run while an image is built: /build/requirements.lock into /opt/venv, and nothing else left behind.
# pip comes from outside (/build/pip.zip), or is that of the base image.
set -eu
[ ! -f /build/certificates.pem ] || export PIP_CERT=/build/certificates.pem
export PYTHONDONTWRITEBYTECODE=1
python3 -m venv --without-pip /opt/venv
install="install --quiet --no-cache-dir --no-compile --disable-pip-version-check --require-hashes"
if [ -f /build/pip.zip ]; then
    PYTHONPATH=/build/pip.zip /opt/venv/bin/python -m pip $install -r /build/requirements.lock
else
    python3 -m pip --python /opt/venv/bin/python $install -r /build/requirements.lock
fi

# nothing is built in an image: no headers, no static libraries, no tests of other people's code
cd /opt/venv/lib/python3*/site-packages
for package in torch nvidia triton pyarrow numpy pandas; do
    [ ! -d "$package" ] || find "$package" -type d -name include -prune -exec rm -rf {} +
done
for package in pyarrow numpy pandas; do
    [ ! -d "$package" ] || find "$package" -type d -name tests -prune -exec rm -rf {} +
done
find . -name '*.a' -delete

# the same bytes whenever it is built: compiled files without times in them, one date for all.
# Templates and examples in some packages are no Python and do not compile
python3 -m compileall -qq -j 0 --invalidation-mode unchecked-hash /opt/venv/lib || true
find /opt/venv -exec touch --no-dereference --date "@${SOURCE_DATE_EPOCH:-0}" {} +

# a base image with a pip of its own loses it
rm -rf /build /tmp/* /root/.cache /usr/local/bin/pip* /usr/local/lib/python3*/site-packages/pip*
