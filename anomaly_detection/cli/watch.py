"""Judge every picture that arrives in a folder, until it is stopped: once each, and when it is
complete. Verdicts are JSON lines. Nothing is lost or doubled if the process is killed."""

import argparse
import os
import signal
import threading
from pathlib import Path

from anomaly_detection.cli.arguments import add_device, add_limit, seconds
from anomaly_detection.errors import UserError


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `watch`."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="with all folders below it")
    parser.add_argument(
        "--detector",
        type=Path,
        required=True,
        help="exports/<category>, a model in it, or detectors/<category>.pt",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="verdicts, to which more are added"
    )
    parser.add_argument(
        "--journal",
        type=Path,
        metavar="FILE",
        help="what has been judged and delivered; default: the name of --out with .journal",
    )
    parser.add_argument(
        "--move",
        type=Path,
        metavar="FOLDER",
        help="for judged pictures: normal, anomalous and unreadable below it; default: they stay",
    )
    parser.add_argument(
        "--settle",
        type=seconds,
        default=1.0,
        metavar="SECONDS",
        help="a picture is complete when it has not changed for so long; default: 1; 0 if pictures "
        "are renamed into place",
    )
    parser.add_argument(
        "--poll",
        type=seconds,
        metavar="SECONDS",
        help="look at the whole folder so often: for network drives, which tell of no changes",
    )
    parser.add_argument(
        "--masks", type=Path, metavar="FOLDER", help="as of predict, with a mask of each picture"
    )
    parser.add_argument(
        "--webhook",
        metavar="URL",
        help="POST each verdict there; a token may be in ANOMALY_DETECTION_WEBHOOK_TOKEN",
    )
    parser.add_argument(
        "--mqtt",
        metavar="URL",
        help="publish each verdict at mqtt://user@host:1883/topic (mqtts: TLS); a password may be "
        "in ANOMALY_DETECTION_MQTT_PASSWORD",
    )
    add_limit(parser)
    add_device(parser)


def run(options: argparse.Namespace) -> int:
    """Judge what arrives; returns the exit status."""
    try:
        from anomaly_detection.line.inbox import Inbox
    except ImportError:
        raise UserError("watch needs watchfiles: pip install 'anomaly_detection[watch]'.") from None
    from anomaly_detection.line.journal import Journal
    from anomaly_detection.line.patience import say
    from anomaly_detection.line.sinks import FileSink, MqttSink, Sink, WebhookSink
    from anomaly_detection.line.station import proven
    from anomaly_detection.line.watch import Watch

    if not options.folder.is_dir():
        raise UserError(f"{options.folder} must be a folder that pictures arrive in, but is none.")
    if options.move and options.move.resolve() == options.folder.resolve():
        raise UserError(f"--move must be another folder than {options.folder}, or one in it.")
    detector = proven(options.detector, options.device)
    sinks: list[Sink] = [FileSink(options.out)]
    if options.webhook:
        token = os.environ.get("ANOMALY_DETECTION_WEBHOOK_TOKEN")
        sinks.append(WebhookSink(options.webhook, token))
    if options.mqtt:
        password = os.environ.get("ANOMALY_DETECTION_MQTT_PASSWORD")
        sinks.append(MqttSink(options.mqtt, password))
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    watch = Watch(
        detector,
        Inbox(options.folder, options.settle, options.poll, options.move),
        Journal(options.journal or options.out.with_suffix(".journal")),
        sinks,
        stop,
        move=options.move,
        masks=options.masks,
        limit=options.limit,
    )
    say(f"watching {options.folder}; verdicts go to {options.out}")
    watch.run()
    say(f"stopped; {watch.num_judged} pictures were judged since the start")
    return 0
