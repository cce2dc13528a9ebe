"""The last step of a study, which also goes by itself: its report."""

from ssl_ray.config.schema import Study
from ssl_ray.console import say
from ssl_ray.report.write import write_report
from ssl_ray.storage.folders import Folders
from ssl_ray.study.parts import tracker_of
from ssl_ray.text import without_password
from ssl_ray.tracking.server import PORT


def report(study: Study, folders: Folders) -> None:
    """Write table, figures and page from MLflow alone, and show the table."""
    tracker = tracker_of(study, create=False)
    folders.check_writable()  # not before: what was never begun leaves no folder
    if study.search:
        from ssl_ray.report.search import write_search_report

        written = write_search_report(study, tracker, folders.study)
    else:
        written = write_report(study, tracker, folders.study)
    for path in (written.markdown, written.html, *written.files):
        folders.output.push(path)
    uri = without_password(tracker.uri)
    served = uri.startswith("http")
    say(f"\n{written.table}\n")
    say(f"report:  {folders.output.kept(written.html)}")
    say(f"MLflow:  {tracker.link(uri if served else f'http://127.0.0.1:{PORT}')}")
    if not served:
        say(f"         where `ssl-ray ui EXPERIMENT` serves it, or mlflow ui --backend-store-uri '{uri}'")
