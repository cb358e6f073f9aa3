use super::*;

const A: Uuid = Uuid::from_u128(0xA);
const B: Uuid = Uuid::from_u128(0xB);
const M: Uuid = Uuid::from_u128(0x666);
const FENCE: Epoch = Epoch(0);

fn claim(peer: Uuid, epoch: u32) -> Claimant {
    Claimant {
        peer,
        epoch: Epoch(epoch),
        incarnation: Incarnation(peer.into_bytes()),
    }
}

fn led_by(node: Uuid, epoch: u32) -> Option<Leadership> {
    Some(Leadership {
        epoch: Epoch(epoch),
        leader: Some(Leader {
            incarnation: Incarnation(node.into_bytes()),
            name: "a-node".to_owned(),
            node: Some(node),
        }),
    })
}

fn led_by_nobody(epoch: u32) -> Option<Leadership> {
    let epoch = Epoch(epoch);
    Some(Leadership { epoch, leader: None })
}

/// A promise is asked for; what is held of it is a number.
fn asks(border: &mut Border<u32>, claimant: Claimant, order: u32, now_ms: u64) -> Verdict {
    border.judge(claimant, Some(order), FENCE, now_ms)
}

fn orders(border: &mut Border<u32>, claimant: Claimant) -> Verdict {
    border.judge(claimant, None, FENCE, 0)
}

/// One that has obeyed this node, in this epoch.
fn led(node: Uuid, epoch: u32) -> Border<u32> {
    let mut border = Border::default();
    assert_eq!(asks(&mut border, claim(node, epoch), 0, 0), Verdict::Wait(true));
    assert_eq!(border.looked_up(led_by(node, epoch), 0).obeyed.len(), 1);
    border
}

#[test]
fn a_promise_is_held_until_the_object_was_read_and_then_obeyed_without_being_asked_again() {
    let mut border = Border::default();
    assert_eq!(asks(&mut border, claim(A, 3), 1, 0), Verdict::Wait(true));
    assert_eq!(
        asks(&mut border, claim(A, 3), 2, 500),
        Verdict::Wait(false),
        "one look-up"
    );
    let judged = border.looked_up(led_by(A, 3), 600);
    assert_eq!(judged.obeyed, [(claim(A, 3), 2)], "the newest one");
    assert!(judged.refused.is_empty() && judged.look_up.is_none());
    for order in [None, Some(3)] {
        assert_eq!(border.judge(claim(A, 3), order, FENCE, 700), Verdict::Obey);
    }
}

#[test]
fn whoever_the_object_does_not_name_is_refused_and_the_leader_goes_on() {
    let mut border = led(A, 3);
    let other_start = Claimant {
        incarnation: Incarnation([7; 16]),
        ..claim(A, 3)
    };
    let as_if_it_were_a = Claimant { peer: M, ..claim(A, 3) };
    for stranger in [other_start, as_if_it_were_a, claim(M, 3), claim(M, 2)] {
        assert_eq!(orders(&mut border, stranger), Verdict::Refuse, "{stranger:?}");
        assert_eq!(asks(&mut border, stranger, 0, 0), Verdict::Refuse, "{stranger:?}");
    }
    // Of an epoch that nobody has heard of the object is asked once.
    assert_eq!(asks(&mut border, claim(M, 9), 9, 0), Verdict::Wait(true));
    assert_eq!(orders(&mut border, claim(A, 3)), Verdict::Obey, "meanwhile");
    let judged = border.looked_up(led_by(A, 3), 10);
    assert_eq!(judged.refused, [(claim(M, 9), 9)]);
    assert!(judged.obeyed.is_empty() && judged.look_up.is_none());
    assert_eq!(asks(&mut border, claim(M, 9), 9, 20), Verdict::Refuse);
    assert_eq!(orders(&mut border, claim(A, 3)), Verdict::Obey);
}

#[test]
fn a_node_that_the_cluster_does_not_have_leads_nothing() {
    let mut border = Border::default();
    assert_eq!(asks(&mut border, claim(A, 3), 1, 0), Verdict::Wait(true));
    let mut gone = led_by(A, 3);
    if let Some(leader) = gone.as_mut().and_then(|gone| gone.leader.as_mut()) {
        leader.node = None;
    }
    assert_eq!(border.looked_up(gone, 0).refused.len(), 1);
}

#[test]
fn what_is_no_promise_costs_no_look_up_and_has_no_effect() {
    let mut border = Border::default();
    assert_eq!(orders(&mut border, claim(A, 3)), Verdict::Answer(Refusal::NoSession));
    assert_eq!(
        border.judge(claim(A, 3), Some(1), Epoch(4), 0),
        Verdict::Answer(Refusal::Fenced)
    );
    assert_eq!(
        asks(&mut border, claim(A, 3), 1, 0),
        Verdict::Wait(true),
        "the first look-up"
    );
}

#[test]
fn while_the_object_cannot_be_read_nothing_is_promised_to_a_new_leader() {
    let mut border = led(A, 3);
    assert_eq!(asks(&mut border, claim(B, 4), 1, 0), Verdict::Wait(true));
    let judged = border.looked_up(None, 0);
    assert!(judged.obeyed.is_empty() && judged.refused.is_empty() && judged.look_up.is_none());
    assert_eq!(orders(&mut border, claim(A, 3)), Verdict::Obey, "the old one goes on");
    assert_eq!(
        asks(&mut border, claim(B, 4), 2, 500),
        Verdict::Wait(true),
        "asked again"
    );
    assert_eq!(border.looked_up(led_by(B, 4), 600).obeyed, [(claim(B, 4), 2)]);
    assert_eq!(orders(&mut border, claim(A, 3)), Verdict::Refuse);
}

#[test]
fn a_claim_that_was_made_while_the_object_was_read_is_looked_up_again_at_once() {
    let mut border = Border::default();
    assert_eq!(asks(&mut border, claim(A, 3), 1, 0), Verdict::Wait(true));
    assert_eq!(asks(&mut border, claim(B, 4), 2, 0), Verdict::Wait(false));
    let judged = border.looked_up(led_by(A, 3), 10);
    assert_eq!(judged.obeyed, [(claim(A, 3), 1)]);
    assert!(judged.look_up == Some(B) && judged.refused.is_empty());
    let judged = border.looked_up(led_by(B, 4), 20);
    assert_eq!(judged.obeyed, [(claim(B, 4), 2)]);
    assert!(judged.look_up.is_none());
}

#[test]
fn nobody_pushes_away_the_promise_of_another_and_few_are_held() {
    let mut border = Border::default();
    assert_eq!(asks(&mut border, claim(A, 3), 1, 0), Verdict::Wait(true));
    for epoch in 4..1000 {
        assert_eq!(asks(&mut border, claim(M, epoch), epoch, 0), Verdict::Wait(false));
        asks(&mut border, claim(Uuid::from_u128(1000 + u128::from(epoch)), 3), 0, 0);
    }
    assert_eq!(border.held.len(), HELD_MAX);
    assert_eq!(border.looked_up(led_by(A, 3), 0).obeyed, [(claim(A, 3), 1)]);
}

#[test]
fn a_peer_that_makes_epochs_up_causes_two_look_ups_and_then_none_for_a_while() {
    let mut border = led(A, 3);
    let mut look_ups = 0;
    for time in 0..1000 {
        let epoch = 10 + u32::try_from(time).expect("small");
        match asks(&mut border, claim(M, epoch), 0, time) {
            Verdict::Wait(true) => {
                look_ups += 1;
                // It sends more of them during each.
                asks(&mut border, claim(M, epoch + 5), 0, time);
                while border.looked_up(led_by(A, 3), time).look_up.is_some() {
                    look_ups += 1;
                    asks(&mut border, claim(M, epoch + 7), 0, time);
                }
            }
            verdict => assert_eq!(verdict, Verdict::Refuse),
        }
    }
    assert!(look_ups <= 4, "{look_ups}");
    // Others are looked up all the while.
    assert_eq!(asks(&mut border, claim(B, 4), 1, 1000), Verdict::Wait(true));
    assert_eq!(border.looked_up(led_by(B, 4), 1000).obeyed.len(), 1);
    // The object has changed: what was refused may be so now.
    assert_eq!(asks(&mut border, claim(M, 5), 1, 1000), Verdict::Wait(true));
}

#[test]
fn an_epoch_that_was_refused_is_looked_up_again_after_a_while_and_a_higher_one_at_once() {
    let mut border = led(A, 3);
    asks(&mut border, claim(B, 4), 0, 0);
    assert_eq!(border.looked_up(led_by(A, 3), 0).refused.len(), 1);
    assert_eq!(asks(&mut border, claim(B, 4), 0, QUIET_MS - 1), Verdict::Refuse);
    assert_eq!(asks(&mut border, claim(B, 5), 0, QUIET_MS - 1), Verdict::Wait(true));
    assert_eq!(border.looked_up(led_by(A, 3), QUIET_MS - 1).refused.len(), 1);
    assert_eq!(asks(&mut border, claim(B, 4), 0, QUIET_MS), Verdict::Wait(true));
}

#[test]
fn an_epoch_that_nobody_leads_any_more_is_not_obeyed_and_the_next_one_is() {
    let mut border = Border::default();
    asks(&mut border, claim(A, 3), 1, 0);
    assert_eq!(border.looked_up(led_by_nobody(3), 0).refused.len(), 1);
    assert_eq!(asks(&mut border, claim(A, 4), 2, 1), Verdict::Wait(true));
    assert_eq!(border.looked_up(led_by(A, 4), 1).obeyed, [(claim(A, 4), 2)]);
}

#[test]
fn an_object_that_went_back_makes_nobody_a_leader() {
    let mut border = led(A, 7);
    asks(&mut border, claim(M, 8), 1, 0);
    assert_eq!(border.looked_up(led_by(M, 5), 0).refused.len(), 1);
    assert_eq!(orders(&mut border, claim(M, 5)), Verdict::Refuse);
    assert_eq!(orders(&mut border, claim(A, 7)), Verdict::Obey);
}

#[test]
fn refusals_are_told_now_and_then_with_how_many_there_were() {
    let mut border = Border::<u32>::default();
    assert_eq!(border.tells(5), Some(1));
    for now_ms in 6..106 {
        assert_eq!(border.tells(now_ms), None);
    }
    assert_eq!(border.tells(5 + TOLD_EVERY_MS), Some(101));
}
