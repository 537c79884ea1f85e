package imapd

import (
	gomime "mime"

	"github.com/emersion/go-imap/v2"

	"posthouse/mailstore/mime"
)

// shownEnvelope turns the stored envelope into the library's, which encodes
// words again for clients that want them so.
func shownEnvelope(e *mime.Envelope) *imap.Envelope {
	return &imap.Envelope{
		Date: e.Date, Subject: e.Subject, From: shownAddresses(e.From), Sender: shownAddresses(e.Sender),
		ReplyTo: shownAddresses(e.ReplyTo), To: shownAddresses(e.To), Cc: shownAddresses(e.Cc), Bcc: shownAddresses(e.Bcc),
		InReplyTo: e.InReplyTo, MessageID: e.MessageID,
	}
}

func shownAddresses(l []mime.Address) []imap.Address {
	if len(l) == 0 {
		return nil
	}
	out := make([]imap.Address, len(l))
	for i, a := range l {
		out[i] = imap.Address{Name: a.Name, Mailbox: a.Mailbox, Host: a.Host}
	}
	return out
}

// shownStructure turns the stored tree into the library's. It is at most
// mime.MaxDepth deep. What the protocol cannot say of an opaque part is said
// as other servers do: a multipart without parts has one empty text, a message
// that was not walked is a row of bytes.
func shownStructure(p *mime.Part) imap.BodyStructure {
	var disp *imap.BodyStructureDisposition
	if p.Disposition != "" {
		disp = &imap.BodyStructureDisposition{Value: p.Disposition, Params: shownParams(p.DispParams)}
	}
	if p.Type == "multipart" {
		m := &imap.BodyStructureMultiPart{Subtype: p.Subtype, Extended: &imap.BodyStructureMultiPartExt{
			Params: shownParams(p.Params), Disposition: disp, Language: p.Language, Location: p.Location}}
		for _, c := range p.Children {
			m.Children = append(m.Children, shownStructure(c))
		}
		if len(m.Children) == 0 {
			m.Children = []imap.BodyStructure{&imap.BodyStructureSinglePart{Type: "text", Subtype: "plain", Encoding: "7BIT",
				Text: &imap.BodyStructureText{}, Extended: &imap.BodyStructureSinglePartExt{}}}
		}
		return m
	}
	b := &imap.BodyStructureSinglePart{Type: p.Type, Subtype: p.Subtype, Params: shownParams(p.Params), ID: p.ID,
		Description: gomime.QEncoding.Encode("utf-8", p.Description), Encoding: p.Encoding, Size: uint32(min(p.End-p.Body, 1<<32-1)),
		Extended: &imap.BodyStructureSinglePartExt{Disposition: disp, Language: p.Language, Location: p.Location}}
	switch {
	case p.Type == "text":
		b.Text = &imap.BodyStructureText{NumLines: p.Lines}
	case p.IsMessage() && len(p.Children) == 1 && p.Envelope != nil:
		b.MessageRFC822 = &imap.BodyStructureMessageRFC822{Envelope: shownEnvelope(p.Envelope), BodyStructure: shownStructure(p.Children[0]), NumLines: p.Lines}
	case p.IsMessage():
		b.Type, b.Subtype = "application", "octet-stream"
	}
	return b
}

// shownParams encodes what is not ASCII as clients expect it in a string.
func shownParams(ps []mime.Param) map[string]string {
	if len(ps) == 0 {
		return nil
	}
	m := make(map[string]string, len(ps))
	for _, p := range ps {
		m[p.Name] = gomime.QEncoding.Encode("utf-8", p.Value)
	}
	return m
}
