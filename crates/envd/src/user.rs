//! Who a process runs as: `/etc/passwd` and `/etc/group`, read as they are.
//!
//! No name service: a static binary has none, and a guest's users are in its files.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Largest user or group file that is read, bytes: hostile guests exist, users by the million do not.
const FILE_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// Most groups that the kernel takes (NGROUPS_MAX).
const GROUPS_MAX: usize = 65536;

/// A user of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) name: String,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Supplementary groups, the primary one included.
    pub(crate) groups: Vec<u32>,
    pub(crate) home: PathBuf,
    pub(crate) shell: String,
}

impl User {
    /// Root, as it is when a guest has no user file at all.
    pub(crate) fn root() -> Self {
        Self {
            name: "root".into(),
            uid: 0,
            gid: 0,
            groups: vec![0],
            home: PathBuf::from("/root"),
            shell: "/bin/sh".into(),
        }
    }

    /// Looks `name` up; `None` if there is no such user.
    pub(crate) fn find(name: &str) -> Option<Self> {
        let passwd = read(Path::new("/etc/passwd")).unwrap_or_default();
        let group = read(Path::new("/etc/group")).unwrap_or_default();
        parse(name, &passwd, &group).or_else(|| (name == "root").then(Self::root))
    }
}

fn read(path: &Path) -> io::Result<String> {
    if fs::metadata(path)?.len() > FILE_BYTES_MAX {
        return Err(io::Error::other("too long"));
    }
    fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

fn parse(name: &str, passwd: &str, group: &str) -> Option<User> {
    let fields: Vec<&str> = passwd
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| fields.len() == 7 && fields[0] == name)?;
    let (uid, gid) = (fields[2].parse().ok()?, fields[3].parse().ok()?);
    let mut groups = vec![gid];
    for line in group.lines() {
        let fields: Vec<&str> = line.split(':').collect();
        if let [_, _, id, members] = fields[..]
            && members.split(',').any(|member| member == name)
            && let Ok(id) = id.parse()
            && !groups.contains(&id)
            && groups.len() < GROUPS_MAX
        {
            groups.push(id);
        }
    }
    Some(User {
        name: name.to_owned(),
        uid,
        gid,
        groups,
        home: PathBuf::from(if fields[5].is_empty() { "/" } else { fields[5] }),
        shell: if fields[6].is_empty() {
            "/bin/sh"
        } else {
            fields[6]
        }
        .to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\nbroken\nuser:x:1000:1001::/home/user:\n";
    const GROUP: &str = "root:x:0:\nsudo:x:27:user\naudio:x:29:other,user\nusers:x:100:users\n";

    #[test]
    fn a_user_comes_with_the_groups_that_name_him() {
        let user = parse("user", PASSWD, GROUP).unwrap();
        assert_eq!((user.uid, user.gid), (1000, 1001));
        assert_eq!(user.groups, [1001, 27, 29]);
        assert_eq!(user.home, Path::new("/home/user"));
        assert_eq!(user.shell, "/bin/sh");
    }

    #[test]
    fn a_user_who_is_not_listed_is_nobody() {
        assert_eq!(parse("use", PASSWD, GROUP), None);
        assert_eq!(parse("broken", PASSWD, GROUP), None);
        assert_eq!(parse("", PASSWD, GROUP), None);
    }
}
