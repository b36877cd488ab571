//! The link's packets on the wire.
//!
//! ```text
//! 0x00  COBS( kind u8 | session u64 | payload length u16 | payload )  0x00
//! ```
//! All numbers little-endian. A zero byte ends a packet; the host puts one more in front of its
//! first, so that whatever half packet the guest still holds ends there. Empty packets (two zero
//! bytes in a row) are no packets. COBS alone does not notice a packet that was cut off at one of
//! its group's ends: the payload length does.
//!
//! The decoder believes nothing: whatever does not parse is dropped up to the next zero byte and
//! counted. It holds at most one packet.

use bytes::Bytes;

/// Version that both sides name in `Hello` and `Ready`.
pub const LINK_VERSION: u8 = 1;

/// Most payload in a packet, bytes. With its overhead a packet fits one write to a virtio-serial
/// port (32 KiB), and it holds a whole yamux frame of 16 KiB.
pub const PAYLOAD_BYTES_MAX: usize = 20 * 1024;

/// kind, session, payload length.
const HEADER_BYTES: usize = 1 + 8 + 2;

/// Most bytes of an encoded packet with its end mark.
pub const PACKET_BYTES_MAX: usize = cobs::max_encoding_length(HEADER_BYTES + PAYLOAD_BYTES_MAX) + 1;

const _: () = assert!(
    PACKET_BYTES_MAX < 32 * 1024,
    "one write to a virtio-serial port"
);
const _: () = assert!(
    PAYLOAD_BYTES_MAX <= u16::MAX as usize,
    "the length field is a u16"
);

/// Ends a packet; occurs nowhere inside one.
const END: u8 = 0;

/// What a packet is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Host to guest: a session with this id begins, all others are over. Payload: link version.
    Hello,
    /// Guest to host: the session is open. Payload: link version.
    Ready,
    /// Bytes of the session, either way.
    Data,
}

impl Kind {
    const fn byte(self) -> u8 {
        match self {
            Self::Hello => 1,
            Self::Ready => 2,
            Self::Data => 3,
        }
    }

    const fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Hello),
            2 => Some(Self::Ready),
            3 => Some(Self::Data),
            _ => None,
        }
    }
}

/// A packet, decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    /// What it is for.
    pub kind: Kind,
    /// Whose it is.
    pub session: u64,
    /// Its bytes, at most [`PAYLOAD_BYTES_MAX`].
    pub payload: Bytes,
}

/// Encodes a packet with its end mark. `payload` beyond [`PAYLOAD_BYTES_MAX`] is the caller's bug.
#[must_use]
pub fn encode(kind: Kind, session: u64, payload: &[u8]) -> Bytes {
    debug_assert!(
        payload.len() <= PAYLOAD_BYTES_MAX,
        "payload of {} bytes",
        payload.len()
    );
    let len = u16::try_from(payload.len()).unwrap_or(u16::MAX);
    let mut plain = Vec::with_capacity(HEADER_BYTES + payload.len());
    plain.push(kind.byte());
    plain.extend_from_slice(&session.to_le_bytes());
    plain.extend_from_slice(&len.to_le_bytes());
    plain.extend_from_slice(payload);
    let mut wire = cobs::encode_vec(&plain);
    wire.push(END);
    Bytes::from(wire)
}

/// Like [`encode`], with an end mark in front as well: for whoever cannot know what the peer has
/// read so far.
#[must_use]
pub fn encode_fresh(kind: Kind, session: u64, payload: &[u8]) -> Bytes {
    let packet = encode(kind, session, payload);
    let mut wire = Vec::with_capacity(packet.len() + 1);
    wire.push(END);
    wire.extend_from_slice(&packet);
    Bytes::from(wire)
}

/// Finds packets in a stream of bytes.
#[derive(Debug, Default)]
pub struct Decoder {
    partial: Vec<u8>,
    /// The packet under way is too long: drop everything up to its end.
    skipping: bool,
    dropped: u64,
}

impl Decoder {
    /// A decoder that is in step with a fresh stream.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// How many packets did not parse.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Forgets the packet that is under way: its rest will never come.
    pub fn reset(&mut self) {
        self.partial.clear();
        self.skipping = false;
    }

    /// Takes the next bytes; returns the packets that they complete, in order.
    pub fn feed(&mut self, mut bytes: &[u8]) -> Vec<Packet> {
        let mut packets = Vec::new();
        while let Some(end) = bytes.iter().position(|byte| *byte == END) {
            self.collect(&bytes[..end]);
            bytes = &bytes[end + 1..];
            if let Some(packet) = self.finish() {
                packets.push(packet);
            }
        }
        self.collect(bytes);
        packets
    }

    fn collect(&mut self, bytes: &[u8]) {
        if self.skipping {
            return;
        }
        if self.partial.len() + bytes.len() > PACKET_BYTES_MAX {
            self.partial.clear();
            self.skipping = true;
            return;
        }
        self.partial.extend_from_slice(bytes);
    }

    fn finish(&mut self) -> Option<Packet> {
        if std::mem::take(&mut self.skipping) {
            self.dropped += 1;
            return None;
        }
        if self.partial.is_empty() {
            return None;
        }
        let packet = parse(&mut self.partial);
        self.partial.clear();
        if packet.is_none() {
            self.dropped += 1;
        }
        packet
    }
}

fn parse(wire: &mut [u8]) -> Option<Packet> {
    let len = cobs::decode_in_place(wire).ok()?;
    let plain = wire.get(..len)?;
    let (kind, rest) = plain.split_first()?;
    let (session, rest) = rest.split_first_chunk::<8>()?;
    let (payload_len, payload) = rest.split_first_chunk::<2>()?;
    if payload.len() != usize::from(u16::from_le_bytes(*payload_len))
        || payload.len() > PAYLOAD_BYTES_MAX
    {
        return None;
    }
    Some(Packet {
        kind: Kind::from_byte(*kind)?,
        session: u64::from_le_bytes(*session),
        payload: Bytes::copy_from_slice(payload),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_bytes_on_the_wire_are_pinned() {
        // A change here is a new LINK_VERSION: paused guests speak the old one.
        let wire = encode_fresh(Kind::Data, 0x0807_0605_0403_0201, &[0xaa, 0x00, 0xbb]);
        assert_eq!(
            &wire[..],
            [0, 11, 3, 1, 2, 3, 4, 5, 6, 7, 8, 3, 2, 0xaa, 2, 0xbb, 0],
        );
    }

    #[test]
    fn a_packet_cut_off_anywhere_is_dropped_and_the_next_one_arrives() {
        let lost = encode(Kind::Data, 1, &[7; 600]);
        let next = encode_fresh(Kind::Hello, 2, &[LINK_VERSION]);
        for cut in 0..lost.len() - 1 {
            let mut decoder = Decoder::new();
            assert_eq!(decoder.feed(&lost[..cut]), []);
            let packets = decoder.feed(&next);
            assert_eq!(packets.len(), 1, "cut at {cut}");
            assert_eq!((packets[0].kind, packets[0].session), (Kind::Hello, 2));
        }
    }

    #[test]
    fn a_peer_that_never_ends_a_packet_costs_no_memory() {
        let mut decoder = Decoder::new();
        for _ in 0..64 {
            assert_eq!(decoder.feed(&[1; 32 * 1024]), []);
        }
        assert!(decoder.partial.capacity() <= 2 * PACKET_BYTES_MAX);
        assert_eq!(decoder.feed(&encode_fresh(Kind::Data, 3, b"x")).len(), 1);
        assert_eq!(decoder.dropped(), 1);
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded_however_it_is_cut(
            payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..700), 0..6),
            session in any::<u64>(),
            chunk in 1usize..300,
        ) {
            let wire: Vec<u8> =
                payloads.iter().flat_map(|p| encode(Kind::Data, session, p)).collect();
            let mut decoder = Decoder::new();
            let got: Vec<Vec<u8>> = wire
                .chunks(chunk)
                .flat_map(|bytes| decoder.feed(bytes))
                .map(|packet| packet.payload.to_vec())
                .collect();
            prop_assert_eq!(got, payloads);
            prop_assert_eq!(decoder.dropped(), 0);
        }

        #[test]
        fn noise_neither_panics_nor_desynchronises(noise in prop::collection::vec(any::<u8>(), 0..4096)) {
            let mut decoder = Decoder::new();
            decoder.feed(&noise);
            let packets = decoder.feed(&encode_fresh(Kind::Hello, 9, &[LINK_VERSION]));
            prop_assert_eq!(packets.last().map(|p| p.session), Some(9));
        }
    }
}
