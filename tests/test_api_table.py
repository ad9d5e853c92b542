"""Each row of what the API does over several servers, and the tests that show it (docs/api.md tells it in words)."""

import ast
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest

from lbcore.ollama import ROUTES

TESTS = Path(__file__).parent
DOCS = TESTS.parent / "docs" / "api.md"

Row = tuple[str, tuple[str, ...]]  # what is shown, and by which tests

ROWS: Mapping[str, tuple[tuple[str, ...], tuple[Row, ...]]] = {
    "generating": (
        ("/api/chat", "/api/generate", "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"),
        (
            ("race and hedge, streams and single answers", (
                "lbio/test_proxy_races.py::test_every_racer_is_asked_before_anything_else_happens",
                "lbio/test_proxy_v1_races.py::test_the_quickest_server_wins_and_the_other_is_let_go",
                "lbio/test_proxy_v1_races.py::test_a_hedge_is_made_where_that_is_configured",
                "lbio/test_proxy_v1_races.py::test_a_racer_that_fails_does_not_win",
                "lbio/test_proxy_v1_races.py::test_a_single_answer_that_breaks_is_made_by_the_next_server",
                "core/test_stories.py::test_the_first_token_wins_and_the_loser_is_cancelled_at_that_instant",
            )),
            ("each with its own first token", (
                "lbio/test_proxy_v1_races.py::test_what_comes_before_the_first_token_wins_no_race",
                "lbio/test_proxy_v1_races.py::test_a_thought_and_a_call_are_first_tokens_too",
                "lbio/test_proxy_v1_races.py::test_an_error_before_the_first_token_goes_to_the_next_server",
                "lbio/test_proxy_failures.py::test_a_failure_before_the_first_token_is_invisible",
            )),
            ("each with its own terminator", (
                "lbio/test_watchers.py::test_recordings",
                "lbio/test_proxy_v1_races.py::test_an_answer_that_ends_well_without_a_token_is_one",
                "lbio/test_proxy_v1_races.py::test_a_stream_that_breaks_before_its_first_token_goes_to_the_next_server",
            )),
            ("each with its own shape of errors", (
                "lbio/test_proxy_failures.py::test_a_broken_stream_ends_with_an_error_on_a_line_of_its_own",
                "lbio/test_proxy_v1_races.py::test_a_stream_that_breaks_ends_with_an_error_in_the_shape_of_its_path",
                "lbio/test_proxy_v1_races.py::test_when_all_fail_the_error_is_in_the_shape_of_the_path",
                "core/test_wire_facts.py::test_our_errors_are_written_as_ollamas_own",
            )),
            ("requests reach the server byte for byte", (
                "lbio/test_proxy_paths.py::test_a_body_reaches_each_server_byte_for_byte",
            )),
        ),
    ),
    "embeddings": (
        ("/api/embed", "/api/embeddings", "/v1/embeddings"),
        (
            ("sequential with retry", (
                "lbio/test_proxy_paths.py::test_embeddings_are_made_by_the_next_server_if_one_fails",
                "lbio/test_proxy_whole.py::test_a_passed_through_request_goes_to_a_server_that_has_its_model",
            )),
            ("many inputs are divided over servers with the same digest, and joined in order", (
                "lbio/test_proxy_embed.py::test_the_parts_make_what_one_server_answers",
                "lbio/test_proxy_embed.py::test_only_servers_of_the_build_that_most_have_are_asked",
                "clients/test_openai_embeddings.py::test_embeddings_divided_over_servers_are_those_of_one_server",
            )),
        ),
    ),
    "recordings": (
        ("/v1/audio/transcriptions",),
        (
            ("the model is read from the form, of which nothing is copied", (
                "lbio/test_bodies.py::test_the_model_of_a_form_is_its_field_wherever_it_stands",
                "lbio/test_proxy_paths.py::test_a_recording_reaches_a_server_that_has_its_model_byte_for_byte",
                "lbio/test_proxy_paths.py::test_finding_the_model_of_a_recording_copies_nothing_of_it",
                "clients/test_openai.py::test_a_recording_is_transcribed",
            )),
        ),
    ),
    "views": (
        ("/", "/api/tags", "/v1/models", "/v1/models/:model", "/api/ps", "/api/version"),
        (
            ("one entry a model, whatever the order of the servers", (
                "core/test_catalog_properties.py::test_every_model_of_a_live_server_is_listed_once",
                "core/test_catalog_properties.py::test_the_order_of_the_servers_changes_nothing",
                "core/test_catalog_properties.py::test_a_merge_of_merges_is_the_merge",
                "core/test_catalog_properties.py::test_the_highest_version_does_not_depend_on_order_or_groups",
                "lbio/test_proxy_whole.py::test_tags_and_ps_show_each_model_once",
                "lbio/test_proxy_whole.py::test_the_version_is_the_highest",
            )),
            ("different builds under one name are warned of", (
                "lbio/test_admin.py::test_status_and_log_warn_of_models_that_are_not_the_same_everywhere",
            )),
            ("a server's own view", (
                "lbio/test_proxy_merges.py::test_a_pinned_view_is_that_servers_own",
            )),
        ),
    ),
    "show": (
        ("/api/show",),
        (
            ("sequential, cached by digest", (
                "lbio/test_shows.py::test_a_second_show_is_answered_without_a_server_and_is_the_same",
                "lbio/test_shows.py::test_a_model_that_has_changed_is_asked_for_anew",
            )),
        ),
    ),
    "pull": (
        ("/api/pull",),
        (
            ("one stream of progress that never goes back and ends once", (
                "lbio/test_proxy_merges.py::test_a_pull_reaches_every_server_and_its_progress_is_one_stream",
                "core/test_progress_properties.py::test_whatever_the_interleaving_bars_only_grow_and_the_end_is_told_once",
            )),
            ("a server that fails does not stop the others, and is named", (
                "lbio/test_proxy_merges.py::test_a_pull_that_one_server_cannot_do_is_done_by_the_others_and_says_who_has_it",
                "lbio/test_proxy_merges.py::test_a_server_that_dies_in_a_pull_does_not_stop_the_others",
            )),
            ("stream: false", (
                "lbio/test_proxy_merges.py::test_a_pull_that_is_not_streamed_answers_when_all_are_done",
                "lbio/test_proxy_merges.py::test_a_pull_that_is_not_streamed_and_failed_on_one_server_is_a_502_that_names_it",
            )),
            ("a client that leaves stops the pulls", (
                "lbio/test_proxy_merges.py::test_a_client_that_leaves_stops_the_pulls",
            )),
        ),
    ),
    "create and blobs": (
        ("/api/create", "/api/blobs/:digest"),
        (
            ("a blob goes to all at the speed of the slowest, in little memory", (
                "lbio/test_proxy_blobs.py::test_a_blob_reaches_every_server_byte_for_byte",
                "lbio/test_proxy_blobs.py::test_a_large_blob_takes_little_memory",
            )),
            ("HEAD is 200 only when all have it", (
                "lbio/test_proxy_blobs.py::test_a_blob_is_there_only_when_all_servers_have_it",
            )),
            ("create is broadcast", (
                "lbio/test_proxy_merges.py::test_a_create_is_made_on_every_server",
                "lbio/test_proxy_blobs.py::test_a_model_is_made_of_a_blob_on_every_server",
            )),
        ),
    ),
    "copy and delete": (
        ("/api/copy", "/api/delete"),
        (
            ("on every server that has the model", (
                "lbio/test_proxy_merges.py::test_a_copy_and_a_delete_go_to_every_server_that_has_the_model_and_can_be_seen_at_once",
            )),
            ("also where the model has come just now", (
                "core/test_merge_stories.py::test_a_delete_goes_also_where_the_model_may_have_come_since_the_server_was_read",
                "lbio/test_proxy_merges.py::test_what_is_copied_and_deleted_at_once_is_left_nowhere",
            )),
            ("404 when none has it", (
                "lbio/test_proxy_merges.py::test_what_no_server_has_is_a_404_in_ollamas_words",
            )),
            ("partly failed: 502 with who did and who did not", (
                "lbio/test_proxy_merges.py::test_a_delete_that_failed_on_one_server_is_a_502_that_says_who_did_and_who_did_not",
            )),
        ),
    ),
    "push": (
        ("/api/push",),
        (
            ("from one server that has it, once", (
                "lbio/test_proxy_paths.py::test_a_push_goes_from_one_server_that_has_the_model",
                "lbio/test_proxy_paths.py::test_a_push_is_sent_once_even_if_it_fails",
            )),
        ),
    ),
    "load and unload": (
        (),
        (
            ("load on one server, unload wherever it is loaded", (
                "lbio/test_proxy_whole.py::test_a_load_goes_to_one_server",
                "lbio/test_proxy_whole.py::test_an_unload_goes_to_all_that_have_it_loaded",
                "core/test_stories.py::test_a_load_goes_to_one_server_and_an_unload_to_all_that_have_it_loaded",
            )),
        ),
    ),
    "anything else": (
        (),
        (
            ("passed through to one server; 404, 405 and 307 as Ollama's own", (
                "lbio/test_proxy_paths.py::test_what_is_not_ours_is_answered_by_one_server",
                "lbio/test_proxy_paths.py::test_a_wrong_method_and_a_trailing_slash_are_answered_as_by_a_server",
                "lbio/test_proxy_recordings.py::test_the_answer_is_the_recorded_one",
            )),
        ),
    ),
    "CORS": (
        (),
        (
            ("answered here by Ollama's rules, with configured origins", (
                "lbio/test_cors.py::test_the_head_is_the_recorded_one",
                "lbio/test_cors.py::test_preflights_reach_no_server",
                "lbio/test_cors.py::test_configured_origins",
            )),
        ),
    ),
    "pins": (
        (),
        (
            ("X-Ollama-LB-Server pins any request; a dead server is an error that says so", (
                "lbio/test_proxy_merges.py::test_a_pinned_chat_goes_where_the_client_says",
                "lbio/test_proxy_merges.py::test_a_pinned_pull_goes_only_to_the_servers_named",
                "lbio/test_proxy_merges.py::test_a_pinned_server_that_is_dead_or_unknown_is_an_error_that_says_so",
            )),
        ),
    ),
    "conformance": (
        (),
        (
            ("every recorded exchange has the same answer through the balancer", (
                "lbio/test_proxy_recordings.py::test_the_answer_is_the_recorded_one",
                "lbio/test_proxy_recordings.py::test_a_broken_stream_is_the_recorded_one_with_an_error_at_its_end",
                "lbio/test_proxy_conformance.py::test_same_as_recorded",
                "simulator/test_captures.py::test_same_as_recorded",
                "simulator/test_routes.py::test_every_path_is_there",
            )),
        ),
    ),
}  # fmt: skip
SHOWN = [test for _, rows in ROWS.values() for _, tests in rows for test in tests]


@cache
def names_in(file: str) -> frozenset[str]:
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return frozenset(n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


@pytest.mark.parametrize("test", sorted(set(SHOWN)))
def test_what_shows_it_is_there(test: str) -> None:
    file, _, name = test.partition("::")
    assert name in names_in(file)


def test_every_route_is_in_the_table() -> None:
    assert sorted(route for routes, _ in ROWS.values() for route in routes) == sorted(route.name for route in ROUTES)


def test_every_route_is_told_of_in_the_documentation() -> None:
    told = DOCS.read_text(encoding="utf-8")
    assert [route.name for route in ROUTES if f"`{route.name}`" not in told and f" {route.name}`" not in told] == []
