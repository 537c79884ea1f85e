package link

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"

	"github.com/fxamacker/cbor/v2"
	"github.com/quic-go/quic-go"

	"posthouse/mesh"
)

// The protocols on the socket (ALPN, RFC 7301), and the one inside a spliced stream.
const (
	alpnMesh   = "posthouse-mesh/1"
	alpnJoin   = "posthouse-join/1"
	alpnSplice = "posthouse-splice/1"
)

// Codes with which connections are closed.
const (
	codeBye       quic.ApplicationErrorCode = 0 // shutting down, or no longer used
	codeRevoked   quic.ApplicationErrorCode = 1 // the peer is not admitted any more
	codeReplaced  quic.ApplicationErrorCode = 2 // the peer has started anew
	codeDuplicate quic.ApplicationErrorCode = 3 // a better connection of the pair is there
	codeRefused   quic.ApplicationErrorCode = 4 // by the hello; the reason says why
	codeProtocol  quic.ApplicationErrorCode = 5 // what came makes no sense
	codeTooMany   quic.ApplicationErrorCode = 6 // joins, or connections of one peer
)

// Codes with which streams are reset.
const (
	streamClosed    quic.StreamErrorCode = 0 // by the service's own end
	streamNoService quic.StreamErrorCode = 1
	streamBusy      quic.StreamErrorCode = 2
	streamNoRoute   quic.StreamErrorCode = 3 // via: not connected to the target
	streamProtocol  quic.StreamErrorCode = 4
	streamRefused   quic.StreamErrorCode = 5 // spliced: the far end does not admit the key
)

const (
	helloVersion = 1
	maxHello     = 1024
	maxLineage   = 64
)

// hello is the first message on a connection, on its first stream, from the dialler
// and then from the other side: two bytes of length, then CBOR. Unknown fields are
// ignored, so that later versions may add some.
type hello struct {
	Version   uint64      `cbor:"1,keyasint"`
	Node      mesh.NodeID `cbor:"2,keyasint"`
	Class     Class       `cbor:"3,keyasint"`
	Nonce     []byte      `cbor:"4,keyasint"` // 16 random bytes of this boot
	Seq       uint64      `cbor:"5,keyasint"` // dialler: grows with each connection it dials in this boot
	BootCount uint64      `cbor:"6,keyasint"`
	LogEnd    uint64      `cbor:"7,keyasint"`
	Lineage   []byte      `cbor:"8,keyasint"`
}

// helloDecoding bounds what foreign bytes may make us build.
var helloDecoding = func() cbor.DecMode {
	m, err := cbor.DecOptions{
		MaxNestedLevels: 4, MaxArrayElements: 16, MaxMapPairs: 32,
		DupMapKey: cbor.DupMapKeyEnforcedAPF, IndefLength: cbor.IndefLengthForbidden,
		BinaryUnmarshaler: cbor.BinaryUnmarshalerNone, TextUnmarshaler: cbor.TextUnmarshalerNone,
	}.DecMode()
	if err != nil {
		panic(err) // constants above
	}
	return m
}()

func (h *hello) encode() ([]byte, error) {
	body, err := cbor.Marshal(h)
	if err != nil {
		return nil, fmt.Errorf("encode hello: %w", err)
	}
	if len(body) > maxHello {
		return nil, errors.New("encode hello: too large")
	}
	return append(binary.BigEndian.AppendUint16(nil, uint16(len(body))), body...), nil
}

func readHello(r io.Reader) (*hello, error) {
	var size [2]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return nil, fmt.Errorf("read hello: %w", err)
	}
	n := binary.BigEndian.Uint16(size[:])
	if n > maxHello {
		return nil, fmt.Errorf("read hello: %d bytes", n)
	}
	body := make([]byte, n)
	if _, err := io.ReadFull(r, body); err != nil {
		return nil, fmt.Errorf("read hello: %w", err)
	}
	var h hello
	if err := helloDecoding.Unmarshal(body, &h); err != nil {
		return nil, fmt.Errorf("read hello: %w", err)
	}
	switch {
	case h.Version < helloVersion:
		return nil, fmt.Errorf("read hello: version %d", h.Version)
	case h.Node == 0:
		return nil, errors.New("read hello: no node")
	case h.Class != Control && h.Class != Bulk:
		return nil, fmt.Errorf("read hello: class %d", h.Class)
	case len(h.Nonce) != 16:
		return nil, errors.New("read hello: no boot nonce")
	case len(h.Lineage) > maxLineage:
		return nil, errors.New("read hello: lineage too long")
	}
	return &h, nil
}

// kind says what a stream is for.
type kind uint8

const (
	kindService kind = 1 // name says which
	kindVia     kind = 2 // carry this stream to node; what follows is for it
	kindSpliced kind = 3 // from node through the sender; TLS follows, and in it a header
	kindPeers   kind = 4 // list the nodes that you are connected to
)

// header opens every stream but the hello's: version, kind, class, node (8 bytes, big
// endian), length of name (1 byte), name.
type header struct {
	kind  kind
	class Class
	node  mesh.NodeID // of kindVia and kindSpliced
	name  string      // of kindService
}

const (
	headerVersion = 1
	headerFixed   = 12
	maxName       = 64
)

func (h header) encode() []byte {
	b := make([]byte, 0, headerFixed+len(h.name))
	b = append(b, headerVersion, byte(h.kind), byte(h.class))
	b = binary.BigEndian.AppendUint64(b, uint64(h.node))
	return append(append(b, byte(len(h.name))), h.name...)
}

func readHeader(r io.Reader) (h header, err error) {
	var b [headerFixed + maxName]byte
	if _, err := io.ReadFull(r, b[:headerFixed]); err != nil {
		return h, fmt.Errorf("read stream header: %w", err)
	}
	n := int(b[11])
	switch {
	case b[0] != headerVersion:
		return h, fmt.Errorf("read stream header: version %d", b[0])
	case n > maxName:
		return h, fmt.Errorf("read stream header: name of %d bytes", n)
	}
	if _, err := io.ReadFull(r, b[headerFixed:headerFixed+n]); err != nil {
		return h, fmt.Errorf("read stream header: %w", err)
	}
	h = header{kind: kind(b[1]), class: Class(b[2]), node: mesh.NodeID(binary.BigEndian.Uint64(b[3:])), name: string(b[headerFixed : headerFixed+n])}
	if h.class != Control && h.class != Bulk {
		return h, fmt.Errorf("read stream header: class %d", h.class)
	}
	var ok bool
	switch h.kind {
	case kindService:
		ok = h.node == 0 && checkName(h.name) == nil
	case kindVia, kindSpliced:
		ok = h.node != 0 && n == 0
	case kindPeers:
		ok = h.node == 0 && n == 0
	}
	if !ok {
		return h, fmt.Errorf("read stream header: kind %d makes no sense", h.kind)
	}
	return h, nil
}

// checkName allows what is printable everywhere: a name and a version, "relay/1".
func checkName(name string) error {
	if len(name) == 0 || len(name) > maxName {
		return fmt.Errorf("service name of %d bytes, want 1 to %d", len(name), maxName)
	}
	for _, c := range []byte(name) {
		if !(c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-' || c == '.' || c == '/') {
			return fmt.Errorf("service name %q: want a-z, 0-9, '-', '.', '/'", name)
		}
	}
	return nil
}

// maxPeerList bounds the answer to kindPeers: two bytes of count, then eight each.
const maxPeerList = 1024

func encodePeerList(ids []mesh.NodeID) []byte {
	ids = ids[:min(len(ids), maxPeerList)]
	b := binary.BigEndian.AppendUint16(nil, uint16(len(ids)))
	for _, id := range ids {
		b = binary.BigEndian.AppendUint64(b, uint64(id))
	}
	return b
}

func readPeerList(r io.Reader) ([]mesh.NodeID, error) {
	var size [2]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return nil, fmt.Errorf("read peer list: %w", err)
	}
	n := int(binary.BigEndian.Uint16(size[:]))
	if n > maxPeerList {
		return nil, fmt.Errorf("read peer list: %d peers", n)
	}
	b := make([]byte, 8*n)
	if _, err := io.ReadFull(r, b); err != nil {
		return nil, fmt.Errorf("read peer list: %w", err)
	}
	ids := make([]mesh.NodeID, n)
	for i := range ids {
		ids[i] = mesh.NodeID(binary.BigEndian.Uint64(b[8*i:]))
	}
	return ids, nil
}

// port stands in addresses that are made up; nothing listens there.
const port = 44337

// Addr is the address that stands for a node wherever a library wants one: a
// constant unique local IPv6 address (RFC 4193) that ends in the node's id.
func Addr(node mesh.NodeID) net.Addr {
	ip := make(net.IP, net.IPv6len)
	copy(ip, addrPrefix[:])
	binary.BigEndian.PutUint64(ip[8:], uint64(node))
	return &net.TCPAddr{IP: ip, Port: port}
}

var addrPrefix = [8]byte{0xfd, 'p', 'o', 's', 't', 'h', 0, 0}
