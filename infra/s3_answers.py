"""What S3 servers answer where it is not what AWS answers: taken for what it must mean, or told in a sentence.

Seen of others: listings without IsTruncated, tokens, sizes or times; no ETag; no metadata; a page of HTML with status
200, from a proxy in between.
"""

from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

from botocore.exceptions import BotoCoreError, ClientError, SSLError
from botocore.parsers import ResponseParserError

from infra.store import Entry
from infra.text import quoted

_BUSY = (429, 500, 502, 503, 504)
"""Of a server that starts, stops or is swamped."""
_MEANWHILE = ("RequestTimeout", "ConditionalRequestConflict", "OperationAborted")
"""Of one that another request has got in the way of."""
_PAGE = 1000
"""Entries of a listing's page, where nothing else is said."""
_UNREACHED = "start the server or correct AWS_ENDPOINT_URL"
_REGION = "set AWS_REGION to the bucket's"
_FULL = "free space on the server, as by python -m pipelines.retention"
_REMEDIES = {
    "AccessDenied": "use credentials that may read, write, list and delete there",
    # All that the answer to a HEAD tells.
    "403": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to credentials that may read there",
    "InvalidAccessKeyId": "set AWS_ACCESS_KEY_ID to one that the server knows",
    "SignatureDoesNotMatch": "set AWS_SECRET_ACCESS_KEY to the secret of this AWS_ACCESS_KEY_ID",
    "NoCredentialsError": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "set AWS_SESSION_TOKEN and its keys to ones that have not expired",
    "RequestTimeTooSkewed": "set this machine's clock",
    "PreconditionFailed": "it was replaced while being read",
    "NoSuchBucket": "create the bucket or correct the URL",
    "PermanentRedirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "InvalidRegionError": _REGION,
    "MethodNotAllowed": "set AWS_ENDPOINT_URL to the S3 address, not to that of a web console",
    "QuotaExceeded": _FULL,
    "XMinioStorageFull": _FULL,
    "507": _FULL,
    "EndpointConnectionError": _UNREACHED,
    "ConnectTimeoutError": _UNREACHED,
    "ReadTimeoutError": _UNREACHED,
    "SSLError": "set AWS_CA_BUNDLE to the file with the server's certificate authority, or correct AWS_ENDPOINT_URL",
    "NoS3Answer": "see what answers at AWS_ENDPOINT_URL: a proxy, a login page or a web console is no store",
}
_OF_CHECKSUMS = ("checksum", "aws-chunked", "x-amz-trailer")
_NO_CHECKSUMS = "set AWS_REQUEST_CHECKSUM_CALCULATION=when_required and AWS_RESPONSE_CHECKSUM_VALIDATION=when_required"


class NoS3Answer(ResponseParserError):
    """Something else than an S3 server has answered."""


def refuse_pages(http_response: Any, model: Any, **_: Any) -> None:
    """A handler of botocore's `after-call`: raises NoS3Answer for HTML, and for a listing that is none."""
    if http_response.status_code >= 300:
        return
    if model.name == "GetObject":  # its body is still to come
        kind = http_response.headers.get("content-type", "")
        if kind.startswith("text/html") and not urlsplit(http_response.url).path.endswith((".html", ".htm")):
            raise NoS3Answer("the answer is a page of HTML, not the object")
        return
    content = http_response.content[:4096]
    if b"<html" in content.lower():
        raise NoS3Answer("the answer is a page of HTML, not an S3 server's")
    if model.name.startswith("List") and not content:
        raise NoS3Answer("the answer broke off before its first byte")
    if model.name == "ListObjectsV2" and b"ListBucketResult" not in content:
        raise NoS3Answer("the answer is no listing")


def entries(page: Any, prefix: str, root: int, look_up: Callable[[str], Entry]) -> list[Entry]:
    """Those of a page of a listing; without the marks that pyarrow and web consoles leave for folders.

    prefix: what was asked for. root: characters before the store's own keys. look_up: Store.stat, for what has no size
    or time in the listing. NoS3Answer for keys that were not asked for.
    """
    found = []
    for item in page.get("Contents", ()):
        key, size, modified = item.get("Key", ""), item.get("Size"), item.get("LastModified")
        if not key.startswith(prefix):
            raise NoS3Answer(f"the listing of what begins with {quoted(prefix)} has {quoted(key)}")
        if key.endswith("/"):
            continue
        whole = size is not None and modified is not None
        found.append(Entry(key[root:], size, in_utc(modified)) if whole else look_up(key[root:]))
    return found


def next_page(request: dict[str, Any], page: Any) -> dict[str, Any] | None:
    """The request for the page after this one, None if it is the last. NoS3Answer if the server does not go on."""
    keys, token = [item["Key"] for item in page.get("Contents", ())], page.get("NextContinuationToken")
    more = bool(token) or len(keys) >= page.get("MaxKeys", _PAGE)
    if not page.get("IsTruncated", more):
        return None
    mark = {"ContinuationToken": token} if token else {"StartAfter": max(keys, default="")}
    if mark.items() <= request.items() or not any(mark.values()):
        raise NoS3Answer("the listing does not go on: it has neither a token nor an end (list-type=2)")
    return {"Bucket": request["Bucket"], "Prefix": request["Prefix"], **mark}


def entry(key: str, head: Any) -> Entry:
    """From the answer to a HEAD. NoS3Answer if that lacks what a listing needs."""
    lacks = [name for name in ("ContentLength", "LastModified") if head.get(name) is None]
    if lacks:
        raise NoS3Answer(f"the server does not tell its {' and '.join(lacks)}")
    return Entry(key, head["ContentLength"], in_utc(head["LastModified"]))


def in_utc(moment: datetime) -> datetime:
    """A server's time."""
    return moment.astimezone(UTC)


def may_pass(error: Exception) -> bool:
    """Whether the same request may be answered later."""
    if isinstance(error, ClientError):
        return status(error) in _BUSY or code(error) in _MEANWHILE
    # a certificate or a protocol that does not fit now will not fit later
    return not (isinstance(error, SSLError) and _has(error, ("CERTIFICATE_VERIFY", "WRONG_VERSION", "HTTP_REQUEST")))


def status(error: ClientError) -> int:
    """Of HTTP."""
    return error.response["ResponseMetadata"]["HTTPStatusCode"]


def code(error: ClientError) -> str:
    """S3's own, or HTTP's where the answer has none."""
    return error.response.get("Error", {}).get("Code") or str(status(error))


def is_gone(error: Exception) -> bool:
    """Whether the server says that there is no such object."""
    return isinstance(error, ClientError) and code(error) in ("NoSuchKey", "404")


def is_unconditional(error: ClientError) -> bool:
    """Whether the server says that it knows no If-None-Match."""
    return status(error) == 501 or code(error) == "NotImplemented" or _has(error, ("if-none-match",))


def cause(error: BaseException) -> str:
    """What went wrong, and what to do where that is known."""
    name, told = type(error).__name__, str(error)
    if isinstance(error, ClientError):
        name = code(error)
        told = f"{error.response.get('Error', {}).get('Message') or 'refused'} ({name})"
    remedy = _REMEDIES.get(name)
    if isinstance(error, ClientError) and remedy is None and _has(error, _OF_CHECKSUMS):
        remedy = _NO_CHECKSUMS
    return f"{told}; {remedy}" if remedy else told


def _has(error: BotoCoreError | ClientError, texts: Iterable[str]) -> bool:
    said = str(error).lower()
    return any(text.lower() in said for text in texts)
