//! Files that the original knows, bad ones, and files that change under the follower.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::os::unix::fs::symlink;

use super::*;

fn parsed(text: &str) -> Result<(Vec<String>, Option<u64>)> {
    let settings = Settings::parse(text, false)?;
    let blocks = settings.blocks.iter().map(IpNet::to_string).collect();
    Ok((blocks, settings.resync.map(|interval| interval.as_secs())))
}

fn refused(text: &str) -> String {
    format!("{:#}", parsed(text).unwrap_err())
}

/// As sorted: IPv4 first, then IPv6.
fn blocks(of: &[&str]) -> Vec<String> {
    let mut blocks: Vec<IpNet> = of.iter().map(|block| block.parse().unwrap()).collect();
    blocks.sort();
    blocks.iter().map(IpNet::to_string).collect()
}

const PRIVATE_AND_LOCAL: [&str; 5] = [
    "10.0.0.0/8",
    "172.16.0.0/12",
    "192.168.0.0/16",
    "169.254.0.0/16",
    "fe80::/10",
];

#[test]
fn files_mean_what_they_mean_to_the_original() {
    let all = "\nnonMasqueradeCIDRs:\n  - 172.16.0.0/12\n  - 10.0.0.0/8\ncidrLimit: 64\nmasqLinkLocal: true\nresyncInterval: 5s\n";
    let listed = blocks(&["172.16.0.0/12", "10.0.0.0/8", "fe80::/10"]);
    assert_eq!(parsed(all).unwrap(), (listed.clone(), Some(5)));
    let all = "\n{\n\t\"nonMasqueradeCIDRs\": [\"172.16.0.0/12\", \"10.0.0.0/8\"],\n\t\"masqLinkLocal\": true,\n\t\"resyncInterval\": \"5s\"\n}\n";
    assert_eq!(parsed(all).unwrap(), (listed, Some(5)));
    for one in [
        "\nnonMasqueradeCIDRs:\n  - 192.168.0.0/16\n",
        "{\n\t\"nonMasqueradeCIDRs\": [\"192.168.0.0/16\"]\n}",
    ] {
        let expected = blocks(&["192.168.0.0/16", "169.254.0.0/16", "fe80::/10"]);
        assert_eq!(parsed(one).unwrap(), (expected, None), "{one}");
    }
    let private = blocks(&PRIVATE_AND_LOCAL);
    for one in ["resyncInterval: 5m", "{\"resyncInterval\": \"5m\"}"] {
        assert_eq!(parsed(one).unwrap(), (private.clone(), Some(300)), "{one}");
    }
    let both = "{\"nonMasqueradeCIDRs\": [\"10.0.0.0/8\", \"fc00::/7\", \"10.0.0.0/8\"], \"masqLinkLocal\": true, \"masqLinkLocalIPv6\": true}";
    assert_eq!(parsed(both).unwrap().0, blocks(&["10.0.0.0/8", "fc00::/7"]));
}

#[test]
fn without_a_list_private_addresses_are_kept() {
    for text in [
        "",
        "\n---\n# nothing yet\n",
        "{}",
        "nonMasqueradeCIDRs: []",
        "nonMasqueradeCIDRs:",
        "masqLinkLocal: null",
    ] {
        let (found, resync) = parsed(text).unwrap();
        assert_eq!(found, blocks(&PRIVATE_AND_LOCAL), "{text:?}");
        assert_eq!(resync, None);
    }
    let found = parsed("masqLinkLocal: true").unwrap().0;
    assert_eq!(
        found,
        blocks(&["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fe80::/10"])
    );
    let all = Settings::parse("", true).unwrap().blocks;
    assert_eq!(all.len(), 13);
    let listed = Settings::parse("nonMasqueradeCIDRs: [10.1.0.0/16]", true);
    assert_eq!(listed.unwrap().blocks.len(), 3);
}

#[test]
fn what_is_wrong_is_said_with_its_line() {
    let unparsed = refused("nonMasqueradeCIDRs:\n- 10.0.0.0/8\n- abcdefg\n");
    assert!(
        unparsed.contains("\"abcdefg\" could not be parsed") && unparsed.contains("line 3"),
        "{unparsed}"
    );
    let json = refused("{\n\"nonMasqueradeCIDRs\": [\n\"10.256.0.0/16\"]}");
    assert!(
        json.contains("10.256.0.0/16") && json.contains("line 3"),
        "{json}"
    );
    let misaligned = refused("masqLinkLocal: true\nnonMasqueradeCIDRs:\n  - 10.0.0.1/8\n");
    assert!(
        misaligned.contains("ip 10.0.0.1, network 10.0.0.0/8") && misaligned.contains("line 3"),
        "{misaligned}"
    );
    assert!(refused("nonMasqueradeCIDRs: [fd00::1/64]").contains("not aligned"));
    assert!(refused("nonMasqueradeCIDRs: ['::ffff:10.0.0.0/104']").contains("IPv4 form"));
    let unknown = refused("resyncInterval: 5s\nnonMasqueradeCIDR: []\n");
    assert!(
        unknown.contains("unknown field `nonMasqueradeCIDR`") && unknown.contains("line 2"),
        "{unknown}"
    );
    let twice = refused("masqLinkLocal: true\nmasqLinkLocal: false\n");
    assert!(twice.contains("duplicate"), "{twice}");
    for (text, word) in [
        ("*", "line 1"),
        ("{*", "line 1"),
        ("- 10.0.0.0/8", "nonMasqueradeCIDRs"),
        ("nonMasqueradeCIDRs: 10.0.0.0/8", "line 1"),
        ("nonMasqueradeCIDRs: [10]", "like 10.0.0.0/8"),
        ("masqLinkLocal: 3", "line 1"),
        ("resyncInterval: 60", "like 60s"),
        ("resyncInterval: 60 s", "like 60s"),
        ("resyncInterval: 1ms", "too short"),
        ("resyncInterval: -1s", "like 60s"),
        ("resyncInterval: 1e300h", "like 60s"),
    ] {
        let said = refused(text);
        assert!(said.contains(word), "{text}: {said}");
    }
}

#[test]
fn more_blocks_than_the_limit_are_refused() {
    let listed = |count: u8, rest: &str| {
        let blocks: Vec<String> = (0..count).map(|n| format!("10.{n}.0.0/16")).collect();
        format!("nonMasqueradeCIDRs: [{}]\n{rest}", blocks.join(", "))
    };
    assert_eq!(parsed(&listed(64, "")).unwrap().0.len(), 66);
    let said = refused(&listed(65, ""));
    assert!(said.contains("65 blocks") && said.contains("64"), "{said}");
    assert_eq!(parsed(&listed(65, "cidrLimit: 65")).unwrap().0.len(), 67);
    assert!(refused(&listed(2, "cidrLimit: 1")).contains("cidrLimit"));
}

#[test]
fn lengths_of_time_are_as_go_writes_them() {
    let milliseconds = |text| duration(text).map(|length| length.as_millis());
    assert_eq!(milliseconds("1h15m30.5s"), Some(4_530_500));
    assert_eq!(milliseconds("1500ms"), Some(1_500));
    assert_eq!(milliseconds(".5m"), Some(30_000));
    assert_eq!(milliseconds("0"), Some(0));
    for bad in ["", "5", "s", "5x", "5s ", "1.2.3s", "-5s", "5s3"] {
        assert_eq!(milliseconds(bad), None, "{bad}");
    }
}

/// Waits for other blocks than these, which must come by themselves.
async fn changed(receiver: &mut watch::Receiver<Vec<IpNet>>) -> Vec<String> {
    tokio::time::timeout(Duration::from_secs(5), receiver.changed())
        .await
        .expect("the change is seen")
        .unwrap();
    let blocks = receiver.borrow_and_update();
    blocks.iter().map(IpNet::to_string).collect()
}

fn only(block: &str) -> String {
    format!("nonMasqueradeCIDRs: [{block}]\nmasqLinkLocal: true\nmasqLinkLocalIPv6: true\n")
}

#[tokio::test]
async fn a_mounted_configmap_is_followed_through_swaps_faults_and_its_end() {
    let dir = tempfile::tempdir().unwrap();
    // Neither the file nor its folder is there yet.
    let mount = dir.path().join("etc/config");
    let path = mount.join("ip-masq-agent");
    let (mut receiver, follower) = follow(&path, false).unwrap();
    let private = blocks(&PRIVATE_AND_LOCAL);
    let first: Vec<String> = receiver.borrow().iter().map(IpNet::to_string).collect();
    assert_eq!(first, private);
    let shutdown = CancellationToken::new();
    let task = tokio::spawn(follower.run(shutdown.clone()));
    tokio::task::yield_now().await;

    // As the kubelet writes it: a folder per version, a link to it that is swapped, a link per key.
    let publish = |version: &str, text: &str| {
        let folder = mount.join(version);
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("ip-masq-agent"), text).unwrap();
        symlink(version, mount.join("..data_tmp")).unwrap();
        std::fs::rename(mount.join("..data_tmp"), mount.join("..data")).unwrap();
    };
    std::fs::create_dir_all(&mount).unwrap();
    publish("..1", &only("10.1.0.0/16"));
    symlink("..data/ip-masq-agent", &path).unwrap();
    assert_eq!(changed(&mut receiver).await, ["10.1.0.0/16"]);
    publish("..2", &only("10.2.0.0/16"));
    std::fs::remove_dir_all(mount.join("..1")).unwrap();
    assert_eq!(changed(&mut receiver).await, ["10.2.0.0/16"]);
    // A bad one changes nothing; the next good one does.
    publish("..3", &only("10.3.0.1/16"));
    assert!(
        tokio::time::timeout(Duration::from_millis(300), receiver.changed())
            .await
            .is_err()
    );
    publish("..4", &only("10.4.0.0/16"));
    assert_eq!(changed(&mut receiver).await, ["10.4.0.0/16"]);
    // Written in place, at the end of the links.
    std::fs::write(mount.join("..4/ip-masq-agent"), only("fd04::/16")).unwrap();
    assert_eq!(changed(&mut receiver).await, ["fd04::/16"]);
    // Gone with all its folders, and there again.
    std::fs::remove_dir_all(dir.path().join("etc")).unwrap();
    assert_eq!(changed(&mut receiver).await, private);
    std::fs::create_dir_all(&mount).unwrap();
    std::fs::write(&path, only("10.5.0.0/16")).unwrap();
    assert_eq!(changed(&mut receiver).await, ["10.5.0.0/16"]);
    shutdown.cancel();
    task.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_file_that_is_bad_from_the_start_leaves_the_defaults() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ip-masq-agent");
    std::fs::write(&path, "nonMasqueradeCIDRs: [x]").unwrap();
    let (receiver, follower) = follow(&path, false).unwrap();
    assert_eq!(receiver.borrow().len(), PRIVATE_AND_LOCAL.len());
    assert!(follower.complaint.unwrap().contains("line 1"));
}
