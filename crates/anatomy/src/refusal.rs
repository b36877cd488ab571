//! Which kernels must not be scanned: those that write into free pages and look at it later.
//!
//! A page that the scan calls free comes back to the guest as zeroes. That is wrong only for a kernel
//! that remembers what it left in a free page. All places of Linux that touch the content of free
//! pages, or keep a record of it:
//!
//! | what | where | verdict |
//! |---|---|---|
//! | page poisoning (`page_poison=1`) writes 0xaa at freeing and checks it at allocation | `mm/page_poison.c` | refused |
//! | `debug_pagealloc=on` unmaps free pages, and turned poisoning on in kernels before 5.11 | `mm/debug_page_alloc.c`, `arch/x86/mm/pat/set_memory.c` | refused |
//! | KASAN keeps a shadow of every page, free ones included | `mm/kasan/` | refused |
//! | KMSAN keeps shadow and origin of every page, and takes both at allocation | `mm/kmsan/` | refused |
//! | PaX's sanitizer (not in mainline) writes 0xfe | `PAX_MEMORY_SANITIZE` | refused |
//! | `init_on_free=1` writes zeroes at freeing and, because of that, not at allocation | `mm/page_alloc.c` (`want_init_on_free`) | allowed: they come back as zero |
//! | `init_on_alloc=1` writes zeroes at allocation | `mm/page_alloc.c` (`post_alloc_hook`) | allowed |
//! | linux-hardened checks at allocation that a sanitized page is zero | `PAGE_SANITIZE_VERIFY` | allowed: it is |
//! | free page reporting, balloon: the host may drop the page and give back zeroes | `mm/page_reporting.c`, `drivers/virtio/virtio_balloon.c` | allowed: the same contract |
//! | hibernation and kexec save or overwrite pages, and leave free ones out by the same marks | `kernel/power/snapshot.c` (`mark_free_pages`) | allowed |
//! | slab poisoning, KFENCE's canaries | `mm/slub.c`, `mm/kfence/` | allowed: their pages are not free for the page allocator |
//! | page owner, page table check, allocation profiling | `mm/page_owner.c`, `mm/page_table_check.c` | allowed: they keep records beside the page array, of owners and not of content |
//! | freed init memory is filled with 0xcc | `mm/page_alloc.c` (`free_reserved_area`) | allowed: nobody looks at it |
//! | `/proc/kcore`, `/dev/mem` show free pages to root | `fs/proc/kcore.c` | allowed: whoever looks there expects nothing |
//!
//! The decision is taken from the kernel's configuration and its whole command line. What can hide
//! parameters from us (a boot configuration inside the initramfs) counts as if it hid these.

/// Why a guest must not be scanned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// Nobody knows how the kernel was built.
    #[error(
        "the guest kernel's configuration is unknown; use a kernel that was set up with its config"
    )]
    UnknownConfig,
    /// The text is no configuration, or another architecture's.
    #[error("the guest kernel's config is not that of an x86-64 kernel")]
    NotX86Config,
    /// The kernel checks a pattern that it wrote into free pages.
    #[error("the guest poisons free pages (page_poison on its command line)")]
    PagePoisoning,
    /// The kernel takes free pages out of its page tables.
    #[error("the guest debugs its page allocator (debug_pagealloc)")]
    DebugPagealloc,
    /// The kernel keeps a shadow of free pages.
    #[error("the guest kernel is built with KASAN")]
    Kasan,
    /// The kernel keeps a shadow of free pages.
    #[error("the guest kernel is built with KMSAN")]
    Kmsan,
    /// The kernel fills free pages with a pattern.
    #[error("the guest kernel is built with PaX's memory sanitizer")]
    PaxSanitize,
    /// Parameters may stand where we do not see them, in a kernel that knows harmful ones.
    #[error(
        "the guest kernel takes parameters from a boot configuration in its initramfs, and is built \
         with page poisoning or debug_pagealloc"
    )]
    HiddenParameters,
}

/// Why a guest whose kernel was built with `config` (the text of `/boot/config-…`) and booted with
/// `cmdline` must not be scanned; `None` if it may be.
///
/// A harmful parameter refuses even where the configuration says that the kernel does not know it:
/// it shows what the guest was meant to be, and the configuration may be a wrong file.
#[must_use]
pub fn refusal(config: Option<&str>, cmdline: &str) -> Option<Refusal> {
    let Some(config) = config else {
        return Some(Refusal::UnknownConfig);
    };
    if !is_set(config, "CONFIG_X86_64") {
        return Some(Refusal::NotX86Config);
    }
    if options(config).any(|(name, value)| {
        value == "y" && (name == "CONFIG_KASAN" || name.starts_with("CONFIG_KASAN_"))
    }) {
        return Some(Refusal::Kasan);
    }
    if is_set(config, "CONFIG_KMSAN") {
        return Some(Refusal::Kmsan);
    }
    if is_set(config, "CONFIG_PAX_MEMORY_SANITIZE") {
        return Some(Refusal::PaxSanitize);
    }
    let built_in = options(config).find(|(name, _)| *name == "CONFIG_CMDLINE");
    let built_in = built_in.map_or("", |(_, value)| value);
    let turned_on = |name| turns_on(cmdline, name) || turns_on(built_in, name);
    if turned_on("debug_pagealloc") || is_set(config, "CONFIG_DEBUG_PAGEALLOC_ENABLE_DEFAULT") {
        return Some(Refusal::DebugPagealloc);
    }
    if turned_on("page_poison") {
        return Some(Refusal::PagePoisoning);
    }
    let knows_harm =
        is_set(config, "CONFIG_PAGE_POISONING") || is_set(config, "CONFIG_DEBUG_PAGEALLOC");
    let hidden = is_set(config, "CONFIG_BOOT_CONFIG")
        && (is_set(config, "CONFIG_BOOT_CONFIG_FORCE")
            || is_set(config, "CONFIG_BOOT_CONFIG_EMBED")
            || parameters(cmdline)
                .chain(parameters(built_in))
                .any(|(name, _)| name == "bootconfig"));
    (knows_harm && hidden).then_some(Refusal::HiddenParameters)
}

/// The lines `CONFIG_NAME=value`; what is not set is a comment.
fn options(config: &str) -> impl Iterator<Item = (&str, &str)> {
    config
        .lines()
        .filter(|line| line.starts_with("CONFIG_"))
        .filter_map(|line| line.trim_end().split_once('='))
}

fn is_set(config: &str, option: &str) -> bool {
    options(config).any(|(name, value)| name == option && value == "y")
}

/// The kernel's parameters, names with `_` for `-` as the kernel compares them (`parameq` in
/// `kernel/params.c`). Quotes are dropped; a quoted value with blanks gives more words than there are
/// parameters, which can only refuse too much. So can what follows `--`, which is for init.
fn parameters(cmdline: &str) -> impl Iterator<Item = (String, Option<&str>)> {
    cmdline.split_ascii_whitespace().map(|word| {
        let word = word.trim_matches('"');
        match word.split_once('=') {
            Some((name, value)) => (name.replace('-', "_"), Some(value.trim_matches('"'))),
            None => (word.replace('-', "_"), None),
        }
    })
}

/// Whether any occurrence of the parameter says other than *off*. (The last one counts for the
/// kernel; an operator who wrote both should get the careful answer.)
fn turns_on(cmdline: &str, name: &str) -> bool {
    parameters(cmdline).any(|(found, value)| found == name && !value.is_some_and(is_off))
}

/// As `kstrtobool` in `lib/kstrtox.c` decides.
fn is_off(value: &str) -> bool {
    let mut letters = value.chars().map(|c| c.to_ascii_lowercase());
    match letters.next() {
        Some('0' | 'n' | 'f') => true,
        Some('o') => letters.next() == Some('f'),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: &str = "# Linux/x86 6.12 Kernel Configuration\nCONFIG_X86_64=y\n\
         CONFIG_HAVE_ARCH_KASAN=y\nCONFIG_CC_HAS_KASAN_GENERIC=y\n\
         CONFIG_KASAN_SHADOW_OFFSET=0xdffffc0000000000\n# CONFIG_KASAN is not set\n\
         # CONFIG_PAGE_POISONING is not set\nCONFIG_BOOT_CONFIG=y\n";

    fn with(more: &str, cmdline: &str) -> Option<Refusal> {
        refusal(Some(&format!("{PLAIN}{more}")), cmdline)
    }

    #[test]
    fn a_usual_kernel_may_be_scanned() {
        assert_eq!(
            with("", "console=ttyS0 init_on_alloc=0 -- bootconfig"),
            None
        );
        assert_eq!(with("", "init_on_free=1"), None);
        assert_eq!(with("CONFIG_INIT_ON_FREE_DEFAULT_ON=y\n", ""), None);
    }

    #[test]
    fn a_kernel_of_unknown_making_is_refused() {
        assert_eq!(refusal(None, ""), Some(Refusal::UnknownConfig));
        for text in ["", "CONFIG_ARM64=y\n", "# CONFIG_X86_64 is not set\n"] {
            assert_eq!(refusal(Some(text), ""), Some(Refusal::NotX86Config));
        }
    }

    #[test]
    fn sanitizers_are_refused() {
        assert_eq!(with("CONFIG_KASAN=y\n", ""), Some(Refusal::Kasan));
        assert_eq!(with("CONFIG_KASAN_GENERIC=y\n", ""), Some(Refusal::Kasan));
        assert_eq!(with("CONFIG_KMSAN=y\n", ""), Some(Refusal::Kmsan));
        let pax = with("CONFIG_PAX_MEMORY_SANITIZE=y\n", "");
        assert_eq!(pax, Some(Refusal::PaxSanitize));
    }

    #[test]
    fn page_poisoning_is_refused_however_it_is_written() {
        for on in [
            "page_poison=1",
            "page_poison=on",
            "quiet page-poison=Y",
            "page_poison",
            "\"page_poison=1\"",
            "page_poison=\"on\"",
            "page_poison=0 page_poison=1",
        ] {
            for config in ["", "CONFIG_PAGE_POISONING=y\n"] {
                assert_eq!(with(config, on), Some(Refusal::PagePoisoning), "{on}");
            }
        }
        let built_in = "CONFIG_CMDLINE_BOOL=y\nCONFIG_CMDLINE=\"quiet page_poison=1\"\n";
        assert_eq!(with(built_in, ""), Some(Refusal::PagePoisoning));
    }

    #[test]
    fn poisoning_that_is_built_in_but_off_is_no_reason() {
        for off in ["", "page_poison=0", "page_poison=off", "page_poison=No"] {
            assert_eq!(with("CONFIG_PAGE_POISONING=y\n", off), None, "{off}");
        }
    }

    #[test]
    fn debug_pagealloc_is_refused_by_parameter_and_by_default() {
        let refused = Some(Refusal::DebugPagealloc);
        assert_eq!(with("", "debug_pagealloc=on"), refused);
        let default = "CONFIG_DEBUG_PAGEALLOC=y\nCONFIG_DEBUG_PAGEALLOC_ENABLE_DEFAULT=y\n";
        assert_eq!(with(default, ""), refused);
        assert_eq!(with("CONFIG_DEBUG_PAGEALLOC=y\n", ""), None);
    }

    #[test]
    fn parameters_that_may_be_hidden_count_where_they_can_do_harm() {
        assert_eq!(with("", "bootconfig"), None);
        for harm in ["CONFIG_PAGE_POISONING=y\n", "CONFIG_DEBUG_PAGEALLOC=y\n"] {
            assert_eq!(with(harm, "bootconfig"), Some(Refusal::HiddenParameters));
            let forced = format!("{harm}CONFIG_BOOT_CONFIG_FORCE=y\n");
            assert_eq!(with(&forced, ""), Some(Refusal::HiddenParameters));
        }
    }
}
