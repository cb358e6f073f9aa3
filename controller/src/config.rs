//! What the controller is told when it starts.

use std::{net::SocketAddr, path::PathBuf, str::FromStr, time::Duration};

use galleonfs_api::{MediaType, name};

use crate::certificates::Times;

/// Everything `run` needs to know.
#[derive(Clone, Debug)]
pub struct ControllerConfig {
    /// Where to serve CSI.
    pub csi_socket: PathBuf,
    /// The namespace of the custom resources and of the Lease: the one GalleonFS is installed in.
    pub namespace: String,
    /// Pools to make on every node that runs the driver.
    pub default_pools: Vec<DefaultPool>,
    /// Whether to take part in the election. Without it the loops run at once: for a single controller by hand.
    pub leader_election: bool,
    /// Name in the election; should be the pod's. A random part is added.
    pub identity: String,
    /// Where to serve health and metrics; `None`: nowhere.
    pub health_address: Option<SocketAddr>,
    /// Name of the service account that node plugins run as: only it may have certificates of nodes.
    pub node_service_account: String,
    /// How long certificates and their authority last.
    pub certificate_times: Times,
    /// How long a replica may stay away before it is replaced.
    pub replacement_delay: Delay,
    /// The kubeconfig file; `None`: the pod's service account, or KUBECONFIG, or the user's own file.
    pub kubeconfig: Option<PathBuf>,
}

/// A pool to make on every node, written `name=default,path=/var/lib/galleonfs/pools/default,media=ssd`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct DefaultPool {
    pub name: String,
    pub path: String,
    pub media: MediaType,
}

impl FromStr for DefaultPool {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (mut pool_name, mut path, mut media) = (None, None, None);
        for part in text.split(',') {
            let (key, value) = part
                .split_once('=')
                .ok_or_else(|| format!("{part:?} is not of the form key=value"))?;
            match key.trim() {
                "name" if name::is_dns_label(value) => pool_name = Some(value.to_string()),
                "name" => {
                    return Err(format!(
                        "pool name {value:?} is not made of lower case letters, digits and '-'"
                    ));
                }
                "path" if value.starts_with('/') && value.len() > 1 && value.split('/').all(|part| part != "..") => {
                    path = Some(value.to_string());
                }
                "path" => return Err(format!("pool path {value:?} is not absolute, or contains '..'")),
                "media" => media = Some(value.parse()?),
                other => return Err(format!("unknown key {other:?}; there are: name, path, media")),
            }
        }
        Ok(Self {
            name: pool_name.ok_or("name=... is missing")?,
            path: path.ok_or("path=... is missing")?,
            media: media.ok_or("media=... is missing (hdd, nvme or ssd)")?,
        })
    }
}

/// A length of time, written as Kubernetes writes it: `90s`, `10m`, `1h30m`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Delay(pub Duration);

impl FromStr for Delay {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is no length of time; write 90s, 10m or 1h30m");
        let mut seconds: u64 = 0;
        for part in text.split_inclusive(['h', 'm', 's']) {
            let unit = match part.chars().next_back() {
                Some('h') => 3600,
                Some('m') => 60,
                Some('s') => 1,
                _ => return Err(bad()),
            };
            let count: u64 = part[..part.len() - 1].parse().map_err(|_| bad())?;
            seconds = count
                .checked_mul(unit)
                .and_then(|more| seconds.checked_add(more))
                .ok_or_else(bad)?;
        }
        match text {
            "" => Err(bad()),
            _ => Ok(Self(Duration::from_secs(seconds))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_delay_is_read_as_kubernetes_writes_it() {
        let seconds = |text: &str| text.parse::<Delay>().map(|delay| delay.0.as_secs());
        assert_eq!(seconds("90s"), Ok(90));
        assert_eq!(seconds("10m"), Ok(600));
        assert_eq!(seconds("1h30m"), Ok(5400));
        assert_eq!(seconds("0s"), Ok(0));
        for bad in [
            "",
            "10",
            "m",
            "10m5",
            "1.5h",
            "-1s",
            "10min",
            "99999999999999999999h",
            "9999999999999999999h",
        ] {
            assert!(seconds(bad).is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn a_default_pool_is_read_from_one_word() {
        let pool: DefaultPool = "name=default,path=/var/lib/galleonfs/pools/default,media=ssd"
            .parse()
            .expect("valid");
        assert_eq!((pool.name.as_str(), pool.media), ("default", MediaType::Ssd));
        assert_eq!(pool.path, "/var/lib/galleonfs/pools/default");
    }

    #[test]
    fn a_default_pool_that_makes_no_sense_is_refused_with_the_reason() {
        for (bad, part) in [
            ("", "key=value"),
            ("name=default", "path"),
            ("name=Default,path=/a,media=ssd", "lower case"),
            ("name=a,path=relative,media=ssd", "absolute"),
            ("name=a,path=/a/../b,media=ssd", "'..'"),
            ("name=a,path=/a,media=tape", "hdd, nvme, ssd"),
            ("name=a,path=/a,colour=blue", "name, path, media"),
        ] {
            let error = bad.parse::<DefaultPool>().expect_err("refused");
            assert!(error.contains(part), "{bad:?}: {error:?} lacks {part:?}");
        }
    }
}
