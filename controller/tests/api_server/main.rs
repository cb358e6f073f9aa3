//! The controller against a real API server: the rules in our definitions, and CSI over the socket with two controllers
//! and a fake node.
//!
//! `GALLEONFS_LAB_BIN` names a directory with `kube-apiserver` and `etcd` (also called `server`, as its Go package is);
//! without it the whole is skipped. Arguments that are not flags select scenarios by a part of their name.

mod certificates;
mod fake_node;
mod lab;
mod replicated;
mod rules;
mod scenarios;

use std::{path::PathBuf, process::ExitCode, time::Duration};

use futures::{FutureExt, future::BoxFuture};
use lab::Lab;

/// A scenario that hangs has failed.
const SCENARIO_MAX: Duration = Duration::from_secs(120);

type Scenario = (&'static str, fn(Lab) -> BoxFuture<'static, ()>);

macro_rules! scenarios {
    ($($module:ident :: $name:ident),* $(,)?) => {
        &[$((stringify!($name), |lab| $module::$name(lab).boxed())),*]
    };
}

const SCENARIOS: &[Scenario] = scenarios![
    // Must be the first: the others need the definitions that it installs.
    scenarios::a_probe_says_what_is_missing,
    rules::the_api_server_refuses_what_must_never_happen,
    certificates::a_node_gets_its_certificate_and_the_next_one_and_two_controllers_make_one_authority,
    certificates::nobody_gets_the_certificate_of_a_node_that_it_is_not_on,
    scenarios::a_volume_lives_from_creation_to_deletion,
    scenarios::nodes_get_their_default_pool,
    scenarios::two_controllers_do_not_both_win_the_last_gigabyte,
    scenarios::a_half_made_volume_is_finished_by_the_next_attempt,
    scenarios::a_failed_replica_is_replaced_elsewhere,
    scenarios::deletion_waits_for_the_node_and_says_so,
    scenarios::growing_beyond_the_pool_changes_nothing,
    replicated::a_volume_of_several_lives_from_creation_to_deletion,
    replicated::too_few_nodes_leave_nothing_behind_and_a_failed_one_is_passed_over,
    replicated::growth_beyond_one_of_the_pools_changes_none_of_them,
    replicated::two_controllers_do_not_share_out_room_that_is_enough_for_one,
    replicated::a_dead_primary_keeps_nobody_from_moving_or_deleting_its_volume,
    replicated::what_a_person_deletes_stays_while_it_is_in_sync,
    replicated::a_disk_that_fails_is_emptied_when_there_is_room_elsewhere,
    // Leaves a node behind that is not ready if it fails.
    replicated::a_replica_that_stays_away_is_replaced_once_though_two_controllers_lead,
    scenarios::a_successor_takes_over_and_an_idle_cluster_is_not_written_to,
];

fn main() -> ExitCode {
    let Some(programs) = std::env::var_os("GALLEONFS_LAB_BIN").map(PathBuf::from) else {
        println!(
            "skipped: GALLEONFS_LAB_BIN is not set; it must name a directory with kube-apiserver and etcd \
             to try the controller against a real API server"
        );
        return ExitCode::SUCCESS;
    };
    let wanted: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with('-'))
        .collect();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let lab = runtime.block_on(Lab::start(&programs)).expect("the API server starts");
    let began = std::time::Instant::now();
    let (mut passed, mut failed) = (0, vec![]);
    for (index, (name, scenario)) in SCENARIOS.iter().enumerate() {
        let selected = wanted.is_empty() || wanted.iter().any(|part| name.contains(part.as_str()));
        // The first one installs what all need.
        if index > 0 && !selected {
            continue;
        }
        let start = std::time::Instant::now();
        let outcome = runtime.block_on(async {
            let run = tokio::spawn(scenario(lab.in_own_namespace(index).await));
            tokio::time::timeout(SCENARIO_MAX, run).await
        });
        let verdict = match outcome {
            Ok(Ok(())) => "ok",
            Ok(Err(_)) => "FAILED",
            Err(_) => "FAILED (hangs)",
        };
        println!("test {name} ... {verdict} ({:.1} s)", start.elapsed().as_secs_f64());
        match verdict {
            "ok" => passed += 1,
            _ => failed.push(*name),
        }
    }
    runtime.block_on(lab.stop());
    let verdict = if failed.is_empty() { "ok" } else { "FAILED" };
    if !failed.is_empty() {
        println!("\nfailures:\n    {}", failed.join("\n    "));
    }
    // In the words of the standard harness, for whoever counts.
    println!(
        "\ntest result: {verdict}. {passed} passed; {} failed; {} filtered out; finished in {:.2}s\n",
        failed.len(),
        SCENARIOS.len() - passed - failed.len(),
        began.elapsed().as_secs_f64()
    );
    match failed.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}
