package mailstore

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/fxamacker/cbor/v2"

	"posthouse/mailstore/log"
	"posthouse/mesh"
	"posthouse/transport"
)

// The records of the mailboxes, as they stand in the log. DESIGN.md describes
// them; testdata/v1 holds one of each. Keys are never reused.

const recordVersion = 1

// deliverRecord is KindDeliver: a message into the INBOX of some mailboxes. Its
// body is this record's, or Source's.
type deliverRecord struct {
	Version   uint8               `cbor:"1,keyasint"`
	ID        transport.MessageID `cbor:"2,keyasint"`
	LegSeq    uint64              `cbor:"3,keyasint,omitempty"`
	Source    *log.Ref            `cbor:"4,keyasint,omitempty"`
	Prefix    []byte              `cbor:"5,keyasint,omitempty"` // put before the body
	Cuts      []cut               `cbor:"6,keyasint,omitempty"` // left out of the body
	Size      int64               `cbor:"7,keyasint"`           // as served
	Time      int64               `cbor:"8,keyasint"`           // Unix seconds, by this node's clock
	Structure []byte              `cbor:"9,keyasint"`           // mime.Structure in its stored form, of the body alone
	Copies    []placed            `cbor:"10,keyasint"`
	Trace     int                 `cbor:"11,keyasint,omitempty"` // Received fields in Prefix
}

type placed struct {
	_       struct{} `cbor:",toarray"`
	Mailbox mesh.MailboxID
	Folder  uint32
	UID     UID
	ModSeq  ModSeq
}

// cut is the bytes [From, To) of a body.
type cut struct {
	_        struct{} `cbor:",toarray"`
	From, To int64
}

// appendRecord is KindAppend: one message with its body into one folder.
type appendRecord struct {
	Version   uint8          `cbor:"1,keyasint"`
	Mailbox   mesh.MailboxID `cbor:"2,keyasint"`
	Folder    uint32         `cbor:"3,keyasint"`
	UID       UID            `cbor:"4,keyasint"`
	ModSeq    ModSeq         `cbor:"5,keyasint"`
	System    bits           `cbor:"6,keyasint,omitempty"`
	Keywords  []string       `cbor:"7,keyasint,omitempty"`
	Size      int64          `cbor:"8,keyasint"`
	Time      int64          `cbor:"9,keyasint"` // internal date, Unix seconds
	Structure []byte         `cbor:"10,keyasint"`
}

// flagsRecord is KindFlags. UIDs are packed by packUIDs, here and below.
type flagsRecord struct {
	Version        uint8          `cbor:"1,keyasint"`
	Mailbox        mesh.MailboxID `cbor:"2,keyasint"`
	Folder         uint32         `cbor:"3,keyasint"`
	ModSeq         ModSeq         `cbor:"4,keyasint"`
	Op             FlagOp         `cbor:"5,keyasint"`
	System         bits           `cbor:"6,keyasint,omitempty"`
	Keywords       []string       `cbor:"7,keyasint,omitempty"`
	UIDs           []byte         `cbor:"8,keyasint"`
	UnchangedSince ModSeq         `cbor:"9,keyasint,omitempty"`
}

// expungeRecord is KindExpunge. Without Force only messages that carry \Deleted
// when the record is applied go.
type expungeRecord struct {
	Version uint8          `cbor:"1,keyasint"`
	Mailbox mesh.MailboxID `cbor:"2,keyasint"`
	Folder  uint32         `cbor:"3,keyasint"`
	ModSeq  ModSeq         `cbor:"4,keyasint"`
	UIDs    []byte         `cbor:"5,keyasint"`
	Force   bool           `cbor:"6,keyasint,omitempty"`
}

// copyRecord is KindCopy. The n-th of UIDs gets First + n in To, also when one
// before it is gone by then.
type copyRecord struct {
	Version  uint8          `cbor:"1,keyasint"`
	Mailbox  mesh.MailboxID `cbor:"2,keyasint"`
	From     uint32         `cbor:"3,keyasint"`
	To       uint32         `cbor:"4,keyasint"`
	First    UID            `cbor:"5,keyasint"`
	ToModSeq ModSeq         `cbor:"6,keyasint"`
	UIDs     []byte         `cbor:"7,keyasint"`
	// Move and FromModSeq are set together: the originals go.
	Move       bool   `cbor:"8,keyasint,omitempty"`
	FromModSeq ModSeq `cbor:"9,keyasint,omitempty"`
}

// What a folderRecord or mailboxRecord does.
const (
	opCreate      = 1
	opDelete      = 2
	opRename      = 3
	opSubscribe   = 4
	opUnsubscribe = 5
	opRenew       = 6
)

// folderRecord is KindFolder.
type folderRecord struct {
	Version uint8          `cbor:"1,keyasint"`
	Mailbox mesh.MailboxID `cbor:"2,keyasint"`
	Op      uint8          `cbor:"3,keyasint"`
	New     []newFolder    `cbor:"4,keyasint,omitempty"` // made first, parents before children
	Folder  uint32         `cbor:"5,keyasint,omitempty"` // of opDelete
	From    string         `cbor:"6,keyasint,omitempty"` // of opRename: it and what is below it
	Name    string         `cbor:"7,keyasint,omitempty"` // of opRename: the new name; of the subscriptions
}

type newFolder struct {
	_    struct{} `cbor:",toarray"`
	ID   uint32
	Name string
	Use  SpecialUse
}

// mailboxRecord is KindMailbox. opRenew is for all mailboxes and has no Mailbox.
type mailboxRecord struct {
	Version   uint8          `cbor:"1,keyasint"`
	Op        uint8          `cbor:"2,keyasint"`
	Mailbox   mesh.MailboxID `cbor:"3,keyasint"`
	New       []newFolder    `cbor:"4,keyasint,omitempty"`
	Subscribe []string       `cbor:"5,keyasint,omitempty"`
	Epoch     uint32         `cbor:"6,keyasint,omitempty"`
}

// Delivered is what others may know of a KindDeliver record: the queue ends its
// local leg by it.
type Delivered struct {
	ID        transport.MessageID
	LegSeq    uint64           // 0: no leg of this node
	Mailboxes []mesh.MailboxID // each has its copy
}

// deliveredPart is what Delivered needs of a deliverRecord.
type deliveredPart struct {
	Version uint8               `cbor:"1,keyasint"`
	ID      transport.MessageID `cbor:"2,keyasint"`
	LegSeq  uint64              `cbor:"3,keyasint"`
	Copies  []placed            `cbor:"10,keyasint"`
}

// DecodeDelivered reads the Meta of a KindDeliver record.
func DecodeDelivered(meta []byte) (Delivered, error) {
	var r deliveredPart
	if err := decode(meta, &r); err != nil {
		return Delivered{}, err
	}
	d := Delivered{ID: r.ID, LegSeq: r.LegSeq, Mailboxes: make([]mesh.MailboxID, len(r.Copies))}
	for i, c := range r.Copies {
		d.Mailboxes[i] = c.Mailbox
	}
	return d, nil
}

var encMode, decMode = codec()

func codec() (cbor.EncMode, cbor.DecMode) {
	enc, err := cbor.EncOptions{}.EncMode()
	if err != nil {
		panic(err)
	}
	dec, err := cbor.DecOptions{MaxNestedLevels: 8, MaxArrayElements: 1 << 16, MaxMapPairs: 64}.DecMode()
	if err != nil {
		panic(err)
	}
	return enc, dec
}

// encode never fails: the types above hold nothing that CBOR cannot say.
func encode(v any) []byte {
	b, err := encMode.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("encode %T: %v", v, err))
	}
	return b
}

// record is what every record can say of itself.
type record interface{ version() uint8 }

func (r *deliveredPart) version() uint8 { return r.Version }
func (r *deliverRecord) version() uint8 { return r.Version }
func (r *appendRecord) version() uint8  { return r.Version }
func (r *flagsRecord) version() uint8   { return r.Version }
func (r *expungeRecord) version() uint8 { return r.Version }
func (r *copyRecord) version() uint8    { return r.Version }
func (r *folderRecord) version() uint8  { return r.Version }
func (r *mailboxRecord) version() uint8 { return r.Version }

// Most records concern one mailbox.
func (r *appendRecord) mailbox() mesh.MailboxID  { return r.Mailbox }
func (r *flagsRecord) mailbox() mesh.MailboxID   { return r.Mailbox }
func (r *expungeRecord) mailbox() mesh.MailboxID { return r.Mailbox }
func (r *copyRecord) mailbox() mesh.MailboxID    { return r.Mailbox }
func (r *folderRecord) mailbox() mesh.MailboxID  { return r.Mailbox }

func decode(meta []byte, r record) error {
	if err := decMode.Unmarshal(meta, r); err != nil {
		return fmt.Errorf("decode record: %w", err)
	}
	if v := r.version(); v != recordVersion {
		return fmt.Errorf("record version %d is unknown: it was written by a newer Posthouse", v)
	}
	return nil
}

// packUIDs writes growing UIDs as pairs of uvarints: the gap to the end of the
// run before, and the run's length less one.
func packUIDs(uids []UID) []byte {
	b := make([]byte, 0, 16)
	end := UID(0)
	for i := 0; i < len(uids); {
		j := i + 1
		for j < len(uids) && uids[j] == uids[j-1]+1 {
			j++
		}
		b = binary.AppendUvarint(b, uint64(uids[i]-end))
		b = binary.AppendUvarint(b, uint64(j-i-1))
		end, i = uids[j-1], j
	}
	return b
}

// unpackUIDs reads at most perRecord UIDs.
func unpackUIDs(b []byte) ([]UID, error) {
	var uids []UID
	end := uint64(0)
	for len(b) > 0 {
		gap, n := binary.Uvarint(b)
		if n <= 0 {
			return nil, errUIDs
		}
		more, m := binary.Uvarint(b[n:])
		if m <= 0 || more >= perRecord || len(uids)+int(more) >= perRecord || gap == 0 || gap > 1<<32 || end+gap+more >= 1<<32 {
			return nil, errUIDs
		}
		b = b[n+m:]
		for u := end + gap; u <= end+gap+more; u++ {
			uids = append(uids, UID(u))
		}
		end += gap + more
	}
	return uids, nil
}

var errUIDs = fmt.Errorf("decode record: UIDs: %w", log.ErrDamaged)

// growing returns uids sorted, each once; the argument is not changed.
func growing(uids []UID) []UID {
	if slices.IsSorted(uids) && !hasTwins(uids) {
		return uids
	}
	uids = slices.Clone(uids)
	slices.Sort(uids)
	return slices.Compact(uids)
}

func hasTwins(sorted []UID) bool {
	for i := 1; i < len(sorted); i++ {
		if sorted[i] == sorted[i-1] {
			return true
		}
	}
	return false
}
